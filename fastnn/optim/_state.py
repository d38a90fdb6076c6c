"""Float32 state for 2-byte parameters: which groups ask for it, and how it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class Float32State(Optimizer):
    """An optimizer whose groups have an option for float32 state."""

    # The names of a parameter's state tensors, and of the option.
    _state_names: tuple[str, ...]
    _float32_option: str

    # Whether a group has, or had, the option. A compiled step that read it from the groups would be
    # recompiled for each lr.
    _has_float32_state = False

    def _ask_for_float32(self) -> None:
        """Sets the option in every group that doesn't set it itself."""
        # Not one of torch's options, so groups have it only on request.
        self.defaults[self._float32_option] = True
        for group in self.param_groups:
            group.setdefault(self._float32_option, True)
        self._look_at_groups()

    def _look_at_groups(self) -> None:
        self._has_float32_state = any(map(self._asks_for_float32, self.param_groups))

    def _asks_for_float32(self, group: dict[str, Any]) -> bool:
        return bool(group.get(self._float32_option))

    def _wants_float32(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether this parameter's state must be float32 where torch's would not be."""
        return self._asks_for_float32(group) and param.dtype in (torch.bfloat16, torch.float16)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_at_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as in torch."""
        super().add_param_group(param_group)
        self._look_at_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of ours or of torch's.

        Float32 state is loaded as it is into groups that ask for it; torch would round it to the
        parameters' dtype.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        loaded: dict[str, Any] = {}
        asked: list[bool] = []

        def keep(_: Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(state_dict)
            asked.extend(map(self._asks_for_float32, self.param_groups))

        def load_float32_state(_: Optimizer) -> None:
            groups = zip(self.param_groups, loaded["param_groups"], asked, strict=True)
            for group, saved_group, is_asked in groups:
                if is_asked:
                    group.setdefault(self._float32_option, True)
                self._load_float32_state(group, saved_group["params"], loaded["state"])
            self._look_at_groups()

        with (
            # Runs last of the pre-hooks, and so sees what the others made of the state dict.
            self.register_load_state_dict_pre_hook(keep),
            # Runs first of the post-hooks, so that the others see, and may change, what was loaded.
            self.register_load_state_dict_post_hook(load_float32_state, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _load_float32_state(
        self, group: dict[str, Any], keys: list[int], state: dict[int, dict[str, Any]]
    ) -> None:
        if not self._asks_for_float32(group):
            return
        for param, key in zip(group["params"], keys, strict=True):
            entry = state.get(key)
            if not isinstance(entry, dict) or not self._wants_float32(group, param):
                continue
            for name in self._state_names:
                if isinstance(entry.get(name), Tensor):
                    self.state[param][name] = entry[name].to(param.device, torch.float32)
