"""The tokenizer of a recipe: that of its base, with the chat template and the variables that the recipe sets."""

from typing import TYPE_CHECKING, Any

from graftlm.config.template_variables import checked_with_variables
from graftlm.errors import RecipeError
from graftlm.model.hub.tokenizer import load_tokenizer, plain_template

if TYPE_CHECKING:
    from graftlm.recipe import Recipe


def recipe_tokenizer(recipe: "Recipe") -> Any:
    """The tokenizer, whose chat template begins with `data.template_variables`, so that the adapter keeps them.

    Raises RecipeError for a variable that the template does not read, and BaseModelError.
    """
    tokenizer = load_tokenizer(recipe.base, network=recipe.network)
    if variables := recipe.data.template_variables:
        try:
            tokenizer.chat_template = checked_with_variables(plain_template(tokenizer), variables)
        except ValueError as error:
            raise RecipeError(f"data.template_variables: {error}") from None
    return tokenizer
