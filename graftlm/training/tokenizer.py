"""The tokenizer of a run: that of its base, with the chat template variables that the recipe sets."""

from collections.abc import Mapping
from typing import Any

from graftlm.config.template_variables import checked_with_variables
from graftlm.errors import RecipeError
from graftlm.hub.config import BaseConfig
from graftlm.hub.tokenizer import load_tokenizer, plain_template


def run_tokenizer(base: str | BaseConfig, variables: Mapping[str, Any], *, network: bool = False) -> Any:
    """The tokenizer, whose chat template begins with `variables` (`data.template_variables`), so that the adapter has
    them.

    Raises RecipeError for a variable that the template does not read, and BaseModelError.
    """
    tokenizer = load_tokenizer(base, network=network)
    if variables:
        try:
            tokenizer.chat_template = checked_with_variables(plain_template(tokenizer), variables)
        except ValueError as error:
            raise RecipeError(f"data.template_variables: {error}", code="invalid-template-variables") from None
    return tokenizer
