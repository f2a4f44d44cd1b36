import dataclasses
import typing

from yopo_ext.training.config.method_options import declared_methods
from yopo_ext.training.methods import METHODS


def test_what_is_read_from_the_sources_is_what_the_classes_have():
    declared = declared_methods()
    assert list(declared) == list(METHODS)
    for name, cls in METHODS.items():
        hints = typing.get_type_hints(cls)
        fields = {
            field.name: (hints[field.name], field.default, field.metadata["help"]) for field in dataclasses.fields(cls)
        }
        found = {option: (d.type, d.default, d.help) for option, d in declared[name].items()}
        assert found == fields, name
