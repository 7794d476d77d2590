"""The name that ComfyUI imports; nothing that tests run needs what it does."""


class MelScale:
    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("this torchaudio is a stub")
