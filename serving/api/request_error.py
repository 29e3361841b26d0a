"""What is wrong with a request by itself. Apart, so that a command can check what a server does."""

from registry.errors import WardrobeError


class RequestError(WardrobeError):
    """A request that is wrong by itself; `param` names the field."""

    code = "invalid_request"
    status = 400

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code
        self.status = status
