"""Frames of the call stack."""


def running_self(frame):
    """The object that a frame runs a method of.

    Args:
        frame (types.FrameType): A running function.

    Returns:
        object, optional: The value of its first argument, if that is called
        ``self``.
    """
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != 'self':
        return None
    variables = frame.f_locals
    owner = variables.get('self')
    if isinstance(variables, dict):
        # Before Python 3.13 the frame keeps this copy of its variables, and
        # with it tensors that its function has already dropped.
        variables.clear()
    return owner
