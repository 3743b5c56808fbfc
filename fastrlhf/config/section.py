"""The base class of all sections of the configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all sections.

    Unknown keys are errors, instances are immutable, and docstrings are the descriptions of fields.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_unset(cls, values: object) -> object:
        """Treat null as unset for fields with a derived default, such as `num_kv_heads: null`."""
        if not isinstance(values, dict):
            return values
        derived = {name for name, field in cls.model_fields.items() if field.default_factory}
        return {
            key: value for key, value in values.items() if value is not None or key not in derived
        }
