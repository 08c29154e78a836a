"""ALE's emulators, handed on: a reset leaves nothing of what was played, and to begin one takes a tenth of a second."""

from collections import defaultdict

from ale_py.vector_env import AtariVectorEnv

idle: dict[object, list[AtariVectorEnv]] = defaultdict(list)


class Lent:
    """An `AtariVectorEnv` until it is closed or forgotten; then the next that asks for such a one has it."""

    _real = None

    def __init__(self, game: str, number: int, **settings: object) -> None:
        self._same = idle[(game, number, *sorted(settings.items()))]
        self._real = self._same.pop() if self._same else AtariVectorEnv(game, number, **settings)
        self._sent = 0  # that nothing has come back of yet

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    @property
    def closed(self) -> bool:
        return self._real is None

    def send(self, actions: object) -> None:
        self._real.send(actions)
        self._sent += 1

    def recv(self) -> object:
        self._sent -= 1
        return self._real.recv()

    def close(self) -> None:
        if self._real is not None and not self._sent:
            self._same.append(self._real)
        self._real = None

    __del__ = close
