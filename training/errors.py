"""Every error training raises on purpose. All are WardrobeErrors, so one place prints them.

WardrobeError
└── TrainingError
    ├── RecipeError       recipe.toml or an override says what cannot be done
    ├── DataError         the data is missing, malformed, or too long for the recipe
    │   └── BadRow        one row of it, by its line
    ├── BaseUnavailable   a base model cannot be fetched or prepared
    ├── HubUnreachable    the Hub does not answer, or says no
    ├── EndpointFailed    a model that rows are generated with does not answer
    └── RunFailed         training stopped: the loss is not finite, or the run is in use
"""

from registry.errors import WardrobeError


class TrainingError(WardrobeError):
    code = "training_error"


class RecipeError(TrainingError):
    code = "recipe_error"


class DataError(TrainingError):
    code = "data_error"


class BadRow(DataError):
    """A row that is no example: `where` is FILE:LINE, `kind` the check it fails."""

    code = "bad_row"

    def __init__(self, where: str, sentence: str, kind: str) -> None:
        super().__init__(f"{where} {sentence}.")
        self.where, self.sentence, self.kind = where, sentence, kind


class BaseUnavailable(TrainingError):
    code = "base_unavailable"


class HubUnreachable(TrainingError):
    code = "hub_unreachable"


class EndpointFailed(TrainingError):
    code = "endpoint_failed"


class RunFailed(TrainingError):
    code = "run_failed"
