"""The names that ComfyUI imports; nothing that tests run needs what they do."""


def roi_align(*args: object, **kwargs: object) -> object:
    raise NotImplementedError("this torchvision is a stub")


box_convert = deform_conv2d = roi_align
