"""Data only: presets and manifests, packaged so that they are in the wheel."""
