"""What the processes that share a swarm of particles exchange."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_methods.optim.foundation.ranks import world_size


@dataclass
class ParticleRanks:
    """Shares out data, particles or coordinates; without several processes everything is the identity.

    Attributes:
        shard: what the ranks share out, "data" or "particles".
        group: the ranks that work together, None for all.
        own_coordinates: whether each rank holds other coordinates of all particles (DTensor parameters).
    """

    shard: Literal["data", "particles"]
    group: dist.ProcessGroup | None = None
    own_coordinates: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    @property
    def own_particles(self) -> bool:
        """Whether each rank holds other particles."""
        return self.shard == "particles" and self.size > 1

    @property
    def stream(self) -> tuple[int, int]:
        """Which stream of random numbers is this rank's, and how many there are."""
        return (self.rank, self.size) if self.own_particles or self.own_coordinates else (0, 1)

    def local(self, number: int) -> int:
        """This rank's share of a number of particles."""
        if not self.own_particles:
            return number
        if number % self.size:
            raise ValueError(
                f"num_particles and particle_batch_size must be multiples of the {self.size} ranks, got {number}"
            )
        return number // self.size

    def agree(self, x: Tensor) -> Tensor:
        """The first rank's tensor, in place."""
        if self.size > 1:
            dist.broadcast(x, group_src=0, group=self.group)
        return x

    def mean_over_data(self, x: Tensor) -> Tensor:
        """Mean over ranks that see different data, in place."""
        if self.size > 1 and self.shard == "data":
            dist.all_reduce(x, group=self.group)
            x.div_(self.size)
        return x

    def sum_over_particles(self, x: Tensor) -> Tensor:
        """Sum over ranks that hold different particles, in place."""
        if self.own_particles:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_particles(self, x: Tensor, dim: int) -> Tensor:
        """Join the ranks' particles along ``dim``."""
        if not self.own_particles:
            return x
        return torch.cat(self.gather(x), dim)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The ranks' tensors, all of one shape."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norms over the coordinates in the last dimension, which stays."""
        if not self.own_coordinates:
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        squares = x.square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt_()

    def largest(self, x: Tensor) -> Tensor:
        """Largest absolute value over the coordinates in the last dimension; not finite if one of them is not."""
        if not self.own_coordinates:
            return torch.linalg.vector_norm(x, torch.inf, dim=-1)
        found = torch.nn.functional.pad(x.abs(), (0, 1)).amax(-1)  # a rank may have no coordinates
        found.nan_to_num_(torch.inf, torch.inf, torch.inf)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found
