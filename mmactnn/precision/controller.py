"""Adaptive precision: bits for the largest reduction of gradient noise."""

import contextlib
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import ops
from ..config import check_count, checked
from ..ops.capture import is_capturing, refuse_capture
from .allocation import allocate_bits

# Fields of a layer's report on one pass.
_FIELDS = (
    'cost',
    'propagated_variance',
    'grad_sq_norm',
    'numel',
    'place',
    'leader',
    'count',
)
# Weight of a new observation in running averages, once there are many.
_MEMORY = 0.1
# Replicas of a model in several threads share one object.
_BEGINNING = threading.Lock()


class AdaptivePrecision:
    """Allocates the bits of one model to its layers and samples.

    **Layers.** In some passes every layer reports, from its backward pass,
    how much variance rounding its input to one bit would add to the model's
    gradient (:mod:`mmactnn.precision.sensitivity`): to the gradient of its
    own weight and, for batch normalisation, through the gradient of its
    input, to the gradients of all layers before it. The reports are averaged
    over passes and summed over processes;
    :func:`mmactnn.precision.allocation.allocate_bits` turns them into bits
    under the budget of the level. A normalisation layer has the bits of the
    convolution whose output it takes.

    **Samples.** Within a layer, bits are allocated to samples by their
    ranges and, with ``num_samples``, by the gradients that they had when
    they were last seen.

    Nothing waits for the device: samples are allocated on it; reports are
    copied to the host in the background and used two passes later, so that
    the same bits hold at the same pass on every process and in every run.

    **Passes.** A pass begins with the first call of any adaptive layer in
    training mode after a backward pass through any of them, whatever method
    of the model calls it: several forward passes before one backward pass
    are one pass. The second run of a checkpointed block, which is inside of
    a backward pass, begins none; its first run without gradients ends the
    pass before. In distributed training all processes begin passes alike;
    where they may not call the same layers, call :meth:`begin_pass` before
    each step.

    **CUDA graphs** keep the bits of the layers that were in force when they
    were captured, and report nothing: their replays are no passes. Every
    replay allocates bits to its samples anew, by their ranges alone. Parts
    that :mod:`mmactnn.graphs` captures are captured anew for other bits, and
    report by :meth:`capturing_reports`.

    Args:
        num_samples (int, optional): Size of the dataset, to follow the
            gradients of its samples. Defaults to ranges only.
        interval (int, optional): Passes between two reports; the first come
            sooner, at passes 1, 2, 4, 8 and so on. Defaults to 100.
        rotated (bool, optional): Whether the model's codes are rotated, as
            far as they are: how variance falls with bits. Defaults to False.

    Raises:
        ValueError, TypeError: If ``num_samples`` or ``interval`` is no
            positive whole number.
    """

    def __init__(self, num_samples=None, interval=100, rotated=False):
        self.num_samples = checked(
            'num_samples', num_samples, check_count, optional=True
        )
        self.interval = checked('interval', interval, check_count)
        self.rotated = rotated
        self.layers = []
        self.collecting = False
        # Whether the next call of a layer may begin a pass. Every call reads
        # this attribute, and only this one.
        self.due = True
        self._passes = 0
        self._open = False
        self._place = 0
        self._averages = {}
        self._pending = []
        self._again = 0
        # Whether layers report although a graph is being captured.
        self.captures_reports = False
        self._samples = None
        self._batch = None
        self._shares = None
        self._history = None
        self._scales = None

    def add(self, name, mean_bits):
        """Add a layer.

        Args:
            name (str): Qualified name of the layer.
            mean_bits (float): Its part of the budget, bits an element.

        Returns:
            LayerBits: Bits and reports of the layer.
        """
        layer = LayerBits(self, len(self.layers), name, mean_bits)
        self.layers.append(layer)
        return layer

    @property
    def bits(self):
        """dict[str, float]: Bits an element of each layer, by its name."""
        return {layer.name: layer.bits for layer in self.layers}

    def set_samples(self, indices):
        """Set the samples of the next pass.

        Args:
            indices (Sequence[int] | Tensor[B]): Their indices in the dataset,
                0 to ``num_samples - 1``, in the order of the batch. The
                batches of all processes have the same size.

        Raises:
            RuntimeError: If there is no ``num_samples``.
            ValueError: If an index is out of range.
        """
        if self.num_samples is None:
            raise RuntimeError(
                'set_samples needs num_samples: convert the model at a level '
                'with use_gradient=True and num_samples=len(dataset)'
            )
        indices = torch.as_tensor(indices, dtype=torch.int64, device='cpu')
        wrong = (indices < 0) | (indices >= self.num_samples)
        if wrong.any():
            raise ValueError(
                f'sample indices must lie within 0 and {self.num_samples - 1}'
                f', got {indices[wrong].tolist()}'
            )
        self._samples = indices.flatten()
        # Even without a backward pass since the last call.
        self.due = True

    def on_call(self):
        """Begin a pass if this call of a layer is the first of one.

        Raises:
            RuntimeError: As :meth:`begin_pass`.
        """
        if self._open and _is_inside_backward():
            return
        with _BEGINNING:
            if not self.due:
                return
            if torch.is_grad_enabled() or is_capturing():
                # This is inside of a backward pass only if no earlier call
                # had gradients: all of the model is checkpointed.
                self.begin_pass()
            else:
                # This may be the first run of a checkpointed block. Its
                # second run is inside of a backward pass, where nothing may
                # wait for other processes.
                self.end_pass()

    def begin_pass(self):
        """Start a pass.

        The first call of a layer after a backward pass does this by itself.

        Raises:
            RuntimeError: If a CUDA graph is being captured, and the samples
                of the pass were named.
        """
        if is_capturing():
            if self._samples is not None:
                raise RuntimeError(
                    'a CUDA graph cannot follow the gradients of samples: '
                    'every replay would take its samples for those of the '
                    'capture. Leave set_samples out, or choose a level '
                    'without use_gradient'
                )
            return
        self.end_pass()
        self._open, self.due = True, False
        self._passes += 1
        while self._pending and self._pending[0][0] <= self._passes:
            self._take(self._pending.pop(0)[1].wait())
        due = self._passes % self.interval == 0
        early = self._passes < self.interval and _is_power_of_two(self._passes)
        self.collecting = due or early or self._again > 0
        self._again = max(self._again - 1, 0)
        self._batch, self._samples = self._samples, None
        self._shares = None
        for layer in self.layers:
            if layer.report is not None or layer.norms is not None:
                layer.reset()
        self._place = 0

    def end_pass(self):
        """End a pass after its backward pass.

        The next pass does this, too. In distributed training all processes
        call it alike.

        Raises:
            RuntimeError: If a CUDA graph is being captured.
        """
        if not self._open:
            return
        refuse_capture(
            'the reports of a pass cannot be captured in a CUDA graph; call '
            'end_pass() before'
        )
        self._open, self.due = False, True
        for layer in self.layers:
            if layer.called:
                layer.close()
        if self._batch is not None:
            self._remember()
        if self.collecting:
            self.collecting = False
            reports = _HostCopy(self._gather_reports())
            self._pending.append((self._passes + 2, reports))

    @contextlib.contextmanager
    def capturing_reports(self):
        """Let layers report in a graph that is captured, as a context.

        Yields:
            CapturedReports: Reports of the graph, complete at the end of the
            context.
        """
        place, self._place = self._place, 0
        due = self.due
        before = [(layer, layer.report) for layer in self.layers]
        for layer in self.layers:
            layer.report = None
        captured = CapturedReports(self)
        self.captures_reports = True
        try:
            yield captured
            captured.take(self._place)
        finally:
            self.captures_reports = False
            self._place, self.due = place, due
            for layer, report in before:
                layer.report = report

    def next_place(self, count=1):
        """Count calls of the backward pass.

        Args:
            count (int, optional): Number of calls. Defaults to 1.

        Returns:
            int: The number of the last one in the pass, from 1.
        """
        self._place += count
        return self._place

    def shares(self, device):
        """Relative gradient norms of the batch's samples, from earlier passes.

        Args:
            device (torch.device): Device for the history, if it is new.

        Returns:
            Tensor[B, L], optional: float32, squared norms for each of L
            layers relative to the layer's mean; None if the indices of the
            batch are unknown.
        """
        if self._batch is None:
            return None
        if self._shares is None:
            if self._history is None:
                self._make_history(device)
            self._batch = _to_device(self._batch, self._history.device)
            self._shares = self._history[self._batch].float()
        return self._shares

    @property
    def batch_size(self):
        """int, optional: Samples whose indices are known in this pass."""
        return None if self._batch is None else len(self._batch)

    def state_dict(self):
        """State with which :meth:`load_state_dict` resumes.

        Call it between passes. It waits for pending reports.

        Returns:
            dict: Numbers and CPU tensors.
        """
        return dict(
            passes=self._passes,
            again=self._again,
            bits=self.bits,
            averages={k: list(v) for k, v in self._averages.items()},
            pending=[(due, copy.wait()) for due, copy in self._pending],
            history=_host_clone(self._history),
            scales=_host_clone(self._scales),
        )

    def load_state_dict(self, state):
        """Resume from a saved state.

        Args:
            state (dict): From :meth:`state_dict`.

        Raises:
            ValueError: If it belongs to other layers or another dataset.
        """
        if set(state['bits']) != set(self.bits):
            odd = sorted(set(state['bits']) ^ set(self.bits))
            raise ValueError(
                'the saved bits belong to other layers; in one of the two '
                f'only: {", ".join(odd[:5])}' + (', ...' if odd[5:] else '')
            )
        history = state['history']
        size = None if history is None else history.shape[0]
        if size is not None and size != self.num_samples:
            raise ValueError(
                f'the saved history is of {size} samples, expected '
                f'{self.num_samples}'
            )
        self._open = self.collecting = False
        self.due = True
        self._passes, self._again = state['passes'], state['again']
        for layer in self.layers:
            layer.bits = state['bits'][layer.name]
            layer.forget_calls()
        self._averages = {k: list(v) for k, v in state['averages'].items()}
        self._pending = [
            (due, _HostCopy(reports)) for due, reports in state['pending']
        ]
        # Clones, since both are updated in place.
        self._history = _host_clone(history)
        self._scales = _host_clone(state['scales'])

    def _gather_reports(self):
        present = [
            layer.report for layer in self.layers if layer.report is not None
        ]
        device = present[0].device if present else _any_device()
        nothing = torch.zeros(len(_FIELDS), device=device)
        reports = torch.stack(
            [
                nothing
                if layer.report is None
                else layer.report.to(device, non_blocking=True)
                for layer in self.layers
            ]
        )
        if _world_size() > 1:
            dist.all_reduce(reports)
        return reports

    def _take(self, reports):
        """Average reports of a pass into earlier ones and allocate bits."""
        reports = reports.double()
        grad_sq_norm = reports[:, _FIELDS.index('grad_sq_norm')].sum().item()
        if not reports.isfinite().all() or grad_sq_norm <= 0:
            # The loss overflowed, or there was no backward pass, or only one
            # through frozen layers. The next two passes report, since in
            # adversarial training every other pass may be of that kind.
            self._again = 2
            return
        reports = [dict(zip(_FIELDS, row)) for row in reports.tolist()]
        for layer, report in zip(self.layers, reports):
            count = report['count']
            if not count:
                continue
            seen = (
                report['cost'] / grad_sq_norm,
                report['propagated_variance'] / count,
                report['grad_sq_norm'] / grad_sq_norm,
                report['numel'],
                report['place'] / count,
            )
            if report['leader']:
                layer.leader = self.layers[round(report['leader'] / count) - 1]
            *old, times = self._averages.get(layer.name, (*seen, 0))
            rate = max(1 / (times + 1), _MEMORY)
            mixed = [a + rate * (b - a) for a, b in zip(old, seen)]
            self._averages[layer.name] = [*mixed, times + 1]
        self._allocate()

    def _allocate(self):
        known = [s for s in self.layers if s.name in self._averages]
        # Noise in a gradient reaches all layers that the backward pass
        # visits later. (The order of the forward pass says less: a block
        # that is checkpointed runs its own in the middle of another's.)
        known.sort(key=lambda s: (-self._averages[s.name][4], -s.index))
        units, before, budget = {}, 0.0, 0.0
        for layer in known:
            cost, propagated_variance, grad_sq_norm, numel, *_ = (
                self._averages[layer.name]
            )
            unit = units.setdefault(_leader(layer).index, [0.0, 0, []])
            unit[0] += cost + propagated_variance * before
            unit[1] += numel
            unit[2].append(layer)
            before += grad_sq_norm
            budget += layer.mean_bits * numel
        costs, sizes, groups = zip(*units.values())
        found = allocate_bits(costs, sizes, budget, self.rotated)
        for bits, members in zip(found, groups):
            for layer in members:
                layer.bits = bits

    def _make_history(self, device):
        size = (self.num_samples, len(self.layers))
        self._history = torch.ones(size, dtype=torch.bfloat16, device=device)
        self._scales = torch.zeros(len(self.layers), device=device)

    def _remember(self):
        """Write the gradients of this pass into the history."""
        norms = [
            layer.norms for layer in self.layers if layer.norms is not None
        ]
        if self._history is None:
            if not norms:
                return
            self._make_history(norms[0].device)
        if norms and self._history.device != norms[0].device:
            self._history = self._history.to(norms[0].device)
            self._scales = self._scales.to(norms[0].device)
        device = self._history.device
        samples = _to_device(self._batch, device)
        nothing = torch.full((len(samples),), float('nan'), device=device)
        seen = torch.stack(
            [
                nothing
                if layer.norms is None
                else layer.norms.to(device, non_blocking=True)
                for layer in self.layers
            ],
            dim=1,
        )
        if _world_size() > 1:
            samples, seen = _all_gather(samples), _all_gather(seen)
        # Relative to a running mean, so that the loss scale, decay of the
        # gradients and differences between layers cancel.
        valid = seen.isfinite()
        count = valid.sum(0)
        mean = torch.where(valid, seen, 0).sum(0) / count.clamp(min=1)
        fresh = torch.where(self._scales > 0, _MEMORY, 1.0)
        updated = self._scales + fresh * (mean - self._scales)
        self._scales = torch.where(count > 0, updated, self._scales)
        relative = seen / self._scales.clamp(min=1e-30)
        # A sample that occurs more than once gets the mean, so that the order
        # of writing does not matter.
        same = (samples[:, None] == samples[None]).float()
        weight = same @ valid.float()
        relative = same @ torch.where(valid, relative, 0) / weight
        known = self._history[samples]
        relative = torch.where(weight > 0, relative.to(known.dtype), known)
        self._history[samples] = relative

    def __getstate__(self):
        """For copies and pickle: with pending reports on the host."""
        state = self.__dict__.copy()
        state['_pending'] = [
            (due, _HostCopy(copy.wait())) for due, copy in self._pending
        ]
        return state

    def __setstate__(self, state):
        """Also of a pickle from before there were rotated codes."""
        self.__dict__.update({'rotated': False, **state})


class CapturedReports:
    """Reports that the replays of a graph write to.

    Args:
        precision (AdaptivePrecision): Precision of the model.
    """

    def __init__(self, precision):
        self._precision = precision
        self._reports = ()
        self._places = 0

    def take(self, places):
        """Take the reports of the layers after the capture.

        Args:
            places (int): Calls of the backward pass in the graph.
        """
        self._places = places
        self._reports = [
            (layer, layer.report)
            for layer in self._precision.layers
            if layer.report is not None
        ]

    def hand_over(self):
        """Report for the layers, after a replay of the backward pass."""
        last = self._precision.next_place(self._places)
        before = last - self._places
        for layer, report in self._reports:
            # The next replay writes to the original.
            report = report.clone()
            count = report[_FIELDS.index('count')]
            report[_FIELDS.index('place')] += before * count
            layer.add_report(report)


class _Earlier(NamedTuple):
    """State of a layer in the last pass that called it.

    Attributes:
        bits (float): See :class:`LayerBits`.
        collecting (bool): See :class:`LayerBits`.
        observes (bool): See :class:`LayerBits`.
    """

    bits: float
    collecting: bool
    observes: bool


class LayerBits:
    """Adaptive bits of one layer, and its reports.

    A checkpointed block may run again in a later pass than its first run, as
    a generator does after a step of the discriminator. It then uses the bits
    of its first run.

    Attributes:
        precision (AdaptivePrecision): Precision of the model.
        index (int): Index in ``precision.layers``.
        name (str): Qualified name of the layer.
        mean_bits (float): Its part of the budget, bits an element.
        bits (float): Bits an element from this pass on.
        leader (LayerBits, optional): Layer whose bits it takes.
        report (Tensor[7], optional): float32, its report in this pass.
        norms (Tensor[B], optional): Squared norms of its samples' gradients
            in this pass.
    """

    def __init__(self, precision, index, name, mean_bits):
        self.precision = precision
        self.index = index
        self.name = name
        self.mean_bits = self.bits = mean_bits
        self.leader = None
        self.forget_calls()
        self.reset()

    def reset(self):
        """Forget the pass before."""
        self.report = self.norms = None

    @property
    def observes(self):
        """bool: Whether the backward pass of this pass reports."""
        if self._runs_again():
            wanted = self.earlier.observes
        else:
            wanted = self._observes_now()
        if not wanted or not is_capturing():
            return wanted
        return self.precision.captures_reports

    @property
    def collecting(self):
        """bool: Whether reports cover the layer, and not only samples."""
        if self._runs_again():
            return self.earlier.collecting
        return self.precision.collecting

    @property
    def bits_of_call(self):
        """float: Bits an element in the current call."""
        return self.earlier.bits if self._runs_again() else self.bits

    def _observes_now(self):
        precision = self.precision
        return precision.collecting or precision.batch_size is not None

    def _runs_again(self):
        """Whether a call belongs to an earlier pass than the current one."""
        return (
            not self.called
            and self.earlier is not None
            and _is_inside_backward()
        )

    def begin_call(self):
        """Register a call of the layer in training mode.

        Every forward pass of an adaptive layer calls this first, with
        gradients and without. Code that decides how layers run calls it
        before it reads :attr:`observes` or bits.
        """
        if self.precision.due:
            self.precision.on_call()
        if not self.called and not _is_inside_backward():
            self.called = True

    def close(self):
        """Remember the state of a called layer at the end of a pass."""
        self.earlier = _Earlier(
            self.bits, self.precision.collecting, self._observes_now()
        )
        self.called = False

    def forget_calls(self):
        """Forget which passes the layer was called in."""
        self.called, self.earlier = False, None

    def note_backward(self):
        """Register a backward pass of the layer.

        The next call begins a pass.
        """
        self.precision.due = True

    def __getstate__(self):
        """For copies and pickle: without reports of the pass."""
        return {**self.__dict__, 'report': None, 'norms': None}

    def row_bits(self, rows, group_size):
        """Allocate the layer's bits to the samples of a tensor.

        By their ranges, also where codes are rotated and their variance
        follows that of the values: ranges tell samples of a layer apart as
        well, since the ratio of both differs little between them, and codes
        of more than 3 bits depend on ranges. (Rotated codes gain more from
        the third bit than is assumed; bits are a little more even than the
        best ones.) No choice of bits is a bias, as it depends on no random
        bits of the codes.

        Args:
            rows (Tensor[N, *]): Tensor that is about to be quantised.
            group_size (int): Elements a range.

        Returns:
            tuple[Tensor, Tensor, int]: ``row_bits`` and ``row_starts`` as
            from :func:`mmactnn.ops.allocate_sample_bits`, and the sum of
            ``row_bits``.
        """
        samples = rows.shape[0]
        energies = ops.sample_range_energy(rows, group_size)
        if self.knows_samples(samples):
            shares = self.precision.shares(rows.device)
            shares = shares[:, self.index].to(rows.device, non_blocking=True)
            energies = energies * shares
        total = self.total_bits(samples)
        return *ops.allocate_sample_bits(energies, total), total

    def knows_samples(self, samples):
        """Whether gradients of the samples are known from earlier passes.

        Args:
            samples (int): Number of samples of the tensor.
        """
        return self.precision.batch_size == samples and not is_capturing()

    def total_bits(self, samples):
        """Sum of the bits a code over the samples of a tensor.

        Args:
            samples (int): Number of samples.

        Returns:
            int: The sum.
        """
        return round(self.bits_of_call * samples)

    def observe_norms(self, norms):
        """Report the gradients of the samples.

        Args:
            norms (Tensor[N]): Squared norms; ignored unless the indices of
                the batch are known, and N of them.
        """
        if self.precision.batch_size == norms.shape[0]:
            known = self.norms
            self.norms = norms if known is None else known + norms

    def observe(
        self, numel, cost, propagated_variance, grad_sq_norm, producer
    ):
        """Report one call from its backward pass.

        Args:
            numel (int): Elements of the input.
            cost (Tensor[]): Variance at one bit of the weight's gradient.
            propagated_variance (Tensor[]): Variance at one bit of the
                gradient of the input, relative to its squared norm.
            grad_sq_norm (Tensor[]): Squared norm of the weight's gradient.
            producer (LayerBits, optional): Layer that made the input.
        """
        place = self.precision.next_place()
        leader = 0 if producer is None else producer.index + 1
        constants = (numel, place, leader, 1)
        report = torch.stack(
            [
                cost,
                propagated_variance,
                grad_sq_norm,
                *(torch.full_like(cost, value) for value in constants),
            ]
        )
        self.add_report(report)

    def add_report(self, report):
        """Add a report to those of this pass.

        Args:
            report (Tensor[7]): float32, of one call or several ones.
        """
        self.report = report if self.report is None else self.report + report


class _HostCopy:
    """Asynchronous copy of a small tensor to the host."""

    def __init__(self, tensor):
        self._event = None
        if tensor.is_cuda:
            self._host = torch.empty_like(
                tensor, device='cpu', pin_memory=True
            )
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor

    def wait(self):
        """Tensor: The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host


def _any_device():
    """Device on which a process without reports joins the all-reduce."""
    # NCCL needs tensors on a GPU.
    if _world_size() > 1 and dist.get_backend() == 'nccl':
        return torch.device('cuda', torch.cuda.current_device())
    return torch.device('cpu')


def _is_inside_backward():
    """Whether autograd is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _leader(layer):
    return layer if layer.leader is None else layer.leader


def _is_power_of_two(value):
    return value & (value - 1) == 0


def _world_size():
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def _all_gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _host_clone(tensor):
    return None if tensor is None else tensor.to('cpu', copy=True)


def _to_device(indices, device):
    if indices.device == device:
        return indices
    if device.type == 'cuda' and not indices.is_cuda:
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)
