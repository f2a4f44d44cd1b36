"""Attacks on a trained model, image by image."""
