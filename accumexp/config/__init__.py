"""The typed configuration: schema, validation and `_target_` instantiation. Imports no torch."""
