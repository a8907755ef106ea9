"""Payload of a tensor whose elements are those of another one, moved."""

from .payload import KINDS, Payload, pieces


class MovedTensor(Payload):
    """Payload of another tensor, and the movements that lead from it here.

    Nothing is kept beside what the other payload keeps.

    Args:
        format (PayloadFormat): Shape, layout and dtype, with the format of
            the other tensor and the movements, :class:`Movement`, as
            ``source``.
        *operands (Tensor, optional): Those of the other payload.
    """

    of_codes_alone = False

    def __init__(self, format, *operands):
        self.format = format
        self.operands = operands

    @property
    def is_exact(self):
        """bool: See the base class."""
        return KINDS[self.format.source[0].kind].is_exact

    @property
    def source(self):
        """Payload: The other payload."""
        format = self.format
        source = format.source[0]._replace(drawn=format.drawn)
        return source.make(*self.operands)

    @property
    def movements(self):
        """tuple[Movement]: The movements, in their order."""
        return self.format.source[1]

    @classmethod
    def of(cls, payload, tensor, movement):
        """Payload of a tensor that was made from another one.

        Args:
            payload (Payload): Payload of the other tensor.
            tensor (Tensor[N, *]): The tensor.
            movement (Movement): The function that made it.

        Returns:
            MovedTensor: The payload.
        """
        source, movements = payload.format, ()
        if source.kind == 'moved':
            source, movements = source.source
        format = payload.format._replace(
            size=tensor.shape,
            stride=tensor.stride(),
            dtype=tensor.dtype,
            kind='moved',
            source=(source, (*movements, movement)),
        )
        return cls(format, *payload.operands)

    def astype(self, dtype):
        """See the base class."""
        if dtype == self.format.dtype:
            return self
        return type(self)(self.format._replace(dtype=dtype), *self.operands)

    def unpack(self, start=None, stop=None):
        """See the base class; all samples are decoded."""
        values = self.source.unpack()
        for move in self.movements:
            values = move(values)
        values = values.to(self.format.dtype)
        return values if start is None and stop is None else values[start:stop]

    def chunks(self, max_bytes):
        """See the base class."""
        values, format = self.unpack(), self.format
        nbytes = values.numel() * format.dtype.itemsize
        for part in pieces(format.size[0], nbytes, max_bytes):
            yield part, values[part]


class Movement:
    """A call of a function that moves the elements of a tensor.

    Args:
        function (Callable): Function of the tensor.
        args (tuple): Its further arguments.
        kwargs (dict): Its keyword arguments.
        index (int, optional): Place of the tensor among several results.
            Defaults to None: there is one.
    """

    def __init__(self, function, args, kwargs, index=None):
        self._call = function, args, kwargs
        self._index = index

    def __call__(self, tensor):
        """Move the elements of a tensor.

        Args:
            tensor (Tensor[*]): A tensor of the same shape as the first one.

        Returns:
            Tensor[*]: The result.
        """
        function, args, kwargs = self._call
        result = function(tensor, *args, **kwargs)
        return result if self._index is None else result[self._index]


def move_exactly(cache, function, tensor, *args, **kwargs):
    """Call a function of a tensor; its result has a payload if that has.

    For functions that are not linear, too: only payloads that decode to the
    very tensor are passed on.

    Args:
        cache (PayloadCache): The payloads.
        function (Callable): Function of the tensor alone.
        tensor (Tensor[*]): The tensor.
        *args: Further arguments, no tensors.
        **kwargs: Keyword arguments, no tensors.

    Returns:
        Tensor[*]: The result.
    """
    payload = cache.get(tensor)
    result = function(tensor, *args, **kwargs)
    if payload is not None and payload.is_exact and result is not tensor:
        movement = Movement(function, args, kwargs)
        cache.put(result, MovedTensor.of(payload, result, movement))
    return result


KINDS['moved'] = MovedTensor
