"""The names that ComfyUI imports; nothing that tests run needs what they do."""

import enum
import sys
import types


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Transform:
    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, image: object) -> object:
        raise NotImplementedError("this torchvision is a stub")


CenterCrop = Compose = Lambda = Normalize = Resize = ToPILImage = ToTensor = Transform

for _name in ("functional", "v2"):
    _module = types.ModuleType(f"{__name__}.{_name}")
    vars(_module).update(InterpolationMode=InterpolationMode, Compose=Compose, Normalize=Normalize, Resize=Resize)
    sys.modules[_module.__name__] = vars()[_name] = _module
