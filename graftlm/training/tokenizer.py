"""The tokenizer of a recipe: that of its base, with the chat template and the variables that the recipe sets."""

from typing import TYPE_CHECKING, Any

from graftlm.data.template import names_in, with_variables
from graftlm.errors import RecipeError, nearest
from graftlm.model.load import load_tokenizer

if TYPE_CHECKING:
    from graftlm.training.recipe import Recipe


def recipe_tokenizer(recipe: "Recipe") -> Any:
    """The tokenizer, whose chat template begins with `data.template_variables`, so that the adapter keeps them.

    Raises RecipeError for a variable that the template does not read, and BaseModelError.
    """
    tokenizer = load_tokenizer(recipe.base, network=recipe.network)
    variables = recipe.data.template_variables
    if variables:
        own = tokenizer.chat_template
        source = (own.get("default") if isinstance(own, dict) else own) or ""
        names = names_in(source)
        for name in variables:
            if name not in names:
                raise RecipeError(
                    f"data.template_variables: the chat template does not read {name!r}. {nearest(name, names)}"
                )
        tokenizer.chat_template = with_variables(source, variables)
    return tokenizer
