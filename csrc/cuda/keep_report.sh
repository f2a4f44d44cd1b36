# Runs the compiler it is given and keeps what ptxas says beside the object file, as NAME.o.ptxas.txt.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" 2> "$object.ptxas.txt"
status=$?
grep -a -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas.txt" >&2
exit $status
