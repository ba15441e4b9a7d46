# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A resumed run follows its config."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from types import SimpleNamespace
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop

from mmdensecl.registry import HOOKS
from mmdensecl.transfer.pretrained_backbone import mismatch
from mmdensecl.transfer.run_info import literals

from ..resume import ResumeError

# Of a scheduler's state, what is no setting.
PROGRESS = {'last_step', '_global_step', '_last_value', 'base_values'}
# Of a parameter group, what other versions of torch lack.
VERSIONS = {
    'foreach',
    'fused',
    'maximize',
    'capturable',
    'differentiable',
    'decoupled_weight_decay',
}
# Of an optimiser's state, what is as large as the parameter.
MOMENTS = ('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq')
# Of a config, what decides how loaded weights compute, and on which images.
COMPARED = re.compile(
    r'(model|data_preprocessor|train_dataloader(\.dataset)+\.pipeline)\.'
)
# But for what the weights and queues of the checkpoint replace.
REPLACED = ('init_cfg', 'pretrained', 'queue_len')
# A learning rate that ends above this share of its start has not come down.
SMALL = 0.2


@HOOKS.register_module()
class FollowConfigHook(Hook):
    """Let a resumed run follow its config, and say where that is new.

    mmengine lets the settings of a checkpoint overwrite those of the config:
    the learning rate, momentum and weight decay of each parameter group, and
    the type and length of each schedule. Here the two are compared. Where they
    differ, the config counts: schedules are computed anew up to the position
    reached, as if they had been there from the start, and all differences are
    named in one warning. What cannot be followed, another optimiser or other
    parameters, stops the run. Of several optimisers nothing is compared, and a
    warning says so.

    A second warning names what else differs in the model and the train
    pipeline, by the text of the config that the checkpoint holds. Weights
    load whatever the strides, padding or mean and std are now.

    At the start of any run it also warns of a learning rate that does not come
    down by the end, as the schedule is of another length than the run.

    Raises:
        ResumeError: The state of the checkpoint's optimiser does not fit.
    """

    def __init__(self) -> None:
        self.saved_iter = 0
        self.changes: list[str] = []
        self.model_changes: list[str] = []
        self.refusal = ''
        # Of the parameter groups and schedulers, as the config builds them.
        self.fresh: tuple[list[dict], list[dict]] | None = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare, before the checkpoint's settings replace the config's."""
        if runner.cfg.get('resume'):
            text = checkpoint.get('meta', {}).get('cfg')
            self.model_changes = _changed_model(runner.cfg.pretty_text, text)
        wrapper, saved = runner.optim_wrapper, checkpoint.get('optimizer')
        if saved is None or not _is_single(wrapper):
            return
        self.saved_iter = checkpoint.get('meta', {}).get('iter', 0)
        own = runner.param_schedulers or []
        states = [x.state_dict() for x in own]
        self.fresh = deepcopy((_settings(wrapper), states))
        try:
            _check_state(wrapper, saved)
            self.changes += [
                *_changed_groups(wrapper, saved['param_groups']),
                *_changed_schedulers(own, checkpoint.get('param_schedulers')),
            ]
        except ResumeError as error:
            self.refusal = str(error)
            checkpoint['optimizer'] = wrapper.state_dict()
        if self.changes:
            # The config's are computed anew before the training.
            saved.pop('base_param_settings', None)
            checkpoint['param_schedulers'] = []

    def before_train(self, runner) -> None:
        """Go to the position reached, and look at the end from there."""
        resumed = runner.iter > 0 and self.fresh is not None
        if resumed and self.refusal:
            raise ResumeError(
                f'{self.refusal}. Use the config that it was trained with, or '
                'start from its weights alone: load_from=FILE, without '
                '--resume'
            )
        if resumed and (self.changes or runner.iter != self.saved_iter):
            self._recompute(runner)
        if resumed and self.changes:
            lr = _groups_at(runner, runner.iter)[0]['lr']
            runner.logger.warning(
                'The config differs from what the checkpoint was trained '
                f'with, and is followed: {"; ".join(self.changes)}. The '
                f'schedule goes on at iteration {runner.iter} as if it had '
                f'been this one from the start (lr {lr:g}).'
            )
        if runner.iter > 0 and self.model_changes:
            runner.logger.warning(
                'The model or the train pipeline differs from what the '
                'weights of the checkpoint were trained with, and is '
                f'followed: {"; ".join(self.model_changes)}.'
            )
        if runner.iter > 0 and isinstance(
            runner.optim_wrapper, OptimWrapperDict
        ):
            runner.logger.warning(
                'There are several optimisers, so the config was not compared '
                'with the checkpoint: learning rates, other settings and '
                "schedules are the checkpoint's. To have the config's, start "
                'from the weights alone: load_from=FILE, without --resume'
            )
        if runner.iter >= runner.max_iters:
            runner.logger.warning(
                f'All {runner.max_iters} iterations are done: nothing is left '
                'to train. For more, raise train_cfg.max_epochs'
            )
        else:
            _check_end(runner)

    def _recompute(self, runner) -> None:
        """Put the schedules where they would be without a break."""
        schedulers = runner.param_schedulers or []
        if any(hasattr(x, 'need_val_args') for x in schedulers):
            if not self.changes:
                return
            raise ResumeError(
                'A schedule that depends on past metrics, such as '
                'ReduceOnPlateauLR, cannot be computed anew for: '
                f'{"; ".join(self.changes)}'
            )
        assert self.fresh is not None
        groups, states = deepcopy(self.fresh)
        for group, settings in zip(
            runner.optim_wrapper.param_groups, groups, strict=True
        ):
            group.update(settings)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        # Behind its last iteration the end of an epoch is still to come.
        advance(schedulers, runner, (0, 0), (runner.iter, runner.epoch))


def advance(
    schedulers: Sequence,
    runner,
    start: tuple[int, int],
    end: tuple[int, int],
) -> None:
    """Step schedulers as ParamSchedulerHook does from one iteration on.

    Args:
        schedulers: Of one optimiser.
        runner: With the loop that would step them.
        start: Iterations that they have seen, and epochs to their end.
        end: Those that they are to have seen.
    """
    length = len(runner.train_dataloader)
    by_epoch = [x for x in schedulers if x.by_epoch]
    by_iter = [x for x in schedulers if not x.by_epoch]
    if not isinstance(runner.train_loop, EpochBasedTrainLoop):
        by_epoch = []  # such a loop has no end of an epoch
    step = 1 if by_iter else length
    first = start[0] if by_iter else start[0] // length * length
    with warnings.catch_warnings():
        # The optimiser did its steps before, or never will.
        warnings.simplefilter('ignore')
        # After a stop behind an epoch's last iteration its end is to come.
        for done in range(first, end[0] + 1, step):
            for x in by_iter if done > start[0] else ():
                x.step()
            if done % length == 0 and start[1] < done // length <= end[1]:
                for x in by_epoch:
                    x.step()


def _groups_at(runner, iteration: int) -> list[dict]:
    """Settings of the parameter groups in the iteration after so many."""
    # Copies, which step an optimiser without parameters.
    groups = deepcopy(_settings(runner.optim_wrapper))
    stand_in = SimpleNamespace(param_groups=groups, step=None)
    copies = [copy(x) for x in runner.param_schedulers or []]
    for x in copies:
        x.optimizer = stand_in
    now, end = (runner.iter, runner.epoch), (iteration, runner.max_epochs)
    advance(copies, runner, now, end)
    return groups


def _is_single(wrapper: Any) -> bool:
    """Whether there is an optimiser, and not several."""
    several = isinstance(wrapper, OptimWrapperDict)
    return isinstance(wrapper, OptimWrapper) and not several


def _settings(wrapper: OptimWrapper) -> list[dict]:
    return [
        {k: x for k, x in group.items() if k != 'params'}
        for group in wrapper.param_groups
    ]


def _check_state(wrapper: OptimWrapper, saved: Any) -> None:
    """Refuse a state that is not of these parameters and this optimiser."""
    if not isinstance(saved, dict) or not saved.get('param_groups'):
        raise ResumeError("The checkpoint's optimiser has no param_groups")
    groups = wrapper.optimizer.param_groups
    new, old = (
        [len(x['params']) for x in part]
        for part in (groups, saved['param_groups'])
    )
    if new != old:
        raise ResumeError(
            f'The checkpoint has {sum(old)} parameters in {len(old)} '
            f'parameter groups, the config builds {sum(new)} in {len(new)}'
        )
    for group, settings in zip(groups, saved['param_groups'], strict=True):
        odd = {
            x
            for x in group.keys() ^ settings.keys()
            if x not in VERSIONS and not x.startswith('initial_')
        }
        if odd:
            raise ResumeError(
                f'The config has {type(wrapper.optimizer).__name__}, and the '
                'checkpoint the state of another optimiser (one of them has '
                f'no {", ".join(sorted(odd))})'
            )
        for number, parameter in zip(
            settings['params'], group['params'], strict=True
        ):
            state = saved['state'].get(number, {})
            for name in MOMENTS:
                wrong = name in state and mismatch(state[name], parameter)
                if wrong and state[name] is not None:
                    raise ResumeError(
                        f"{name} of the optimiser's parameter {number}: "
                        f'{wrong}'
                    )


def _changed_groups(wrapper: OptimWrapper, saved: Sequence[dict]) -> list[str]:
    lines = []
    for group, old in zip(wrapper.optimizer.param_groups, saved, strict=True):
        for name in sorted(group.keys() & old.keys() - {'params'}):
            # Where it is scheduled, only its start is a setting.
            if f'initial_{name}' in group.keys() & old.keys():
                continue
            if _plain(group[name]) != _plain(old[name]):
                label = name.removeprefix('initial_')
                lines.append(f'{label}: {group[name]}, was {old[name]}')
    return [*dict.fromkeys(lines)]


def _changed_schedulers(
    own: Sequence, saved: Sequence[dict] | None
) -> list[str]:
    saved = saved or []
    if len(own) != len(saved):
        return [f'schedulers: {len(own)}, were {len(saved)}']
    lines = []
    for scheduler, old in zip(own, saved, strict=True):
        new = scheduler.state_dict()
        name = type(scheduler).__name__
        if new.keys() != old.keys():
            lines.append(f'scheduler: {name}, was of another type')
            continue
        lines += [
            f'{name}.{key}: {new[key]}, was {old[key]}'
            for key in new
            if key not in PROGRESS and _plain(new[key]) != _plain(old[key])
        ]
    return lines


def _changed_model(new: str, old: Any) -> list[str]:
    """What differs in the model and train pipeline of two configs' texts."""
    ours, theirs = map(literals, (new, old))
    # What is no literal in one of the texts is not compared.
    parts = [
        {
            k: repr(x)
            for k, x in _leaves({k: cfg[k] for k in ours if k in theirs})
            if COMPARED.match(k)
        }
        for cfg in (ours, theirs)
    ]
    return [
        f'{name}: {", was ".join(x.get(name, "unset") for x in parts)}'
        for name in {**parts[0], **parts[1]}
        if parts[0].get(name) != parts[1].get(name)
    ]


def _leaves(node: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """The values of a config with their dotted names."""
    if isinstance(node, (list, tuple)) and any(
        isinstance(x, dict) for x in node
    ):
        node = dict(enumerate(node))
    if isinstance(node, dict) and node:
        for key, x in node.items():
            if key not in REPLACED:
                yield from _leaves(x, f'{name}.{key}' if name else str(key))
    else:
        yield name, _plain(node)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_end(runner) -> None:
    """Warn if the learning rate is not small at the end of the run."""
    schedulers = runner.param_schedulers or []
    if not _is_single(runner.optim_wrapper):
        return
    of_lr = [x for x in schedulers if x.param_name == 'lr']
    if not of_lr or any(hasattr(x, 'need_val_args') for x in of_lr):
        return
    groups = _groups_at(runner, runner.max_iters - 1)
    shares = [x['lr'] / x['initial_lr'] for x in groups if x.get('initial_lr')]
    # Where a cosine of the run's own length ends, with few steps.
    by_epoch = all(x.by_epoch for x in of_lr)
    by_epoch &= isinstance(runner.train_loop, EpochBasedTrainLoop)
    steps = runner.max_epochs if by_epoch else runner.max_iters
    cosine = 0.5 + 0.5 * math.cos(math.pi * (steps - 1) / steps)
    if shares and max(shares) > max(SMALL, 1.01 * cosine):
        runner.logger.warning(
            f'The learning rate ends at {max(shares):.0%} of its start: '
            'the schedule is of another length than the run of '
            f'{runner.max_iters} iterations, or counts epochs where the '
            'loop has none. Without T_max and end in param_scheduler it '
            'follows train_cfg.'
        )
