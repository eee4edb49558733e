"""One model on several processes: copies of it (DDP), shards (FSDP2), or copies whose gradients are summed in one order.

PyTorch's own engines, with the gradients' exchange in the last micro-batch of a step only. What FSDP needs is imported where it
is used: that takes a second.
"""
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def choose(parallel, model, memory):
    """'ddp' or 'fsdp' for 'auto': shards where weights, gradients and AdamW's state would fill half of a GPU's memory (bytes)."""
    if parallel != 'auto':
        return parallel
    return 'fsdp' if memory and 4 * 4 * sum(p.numel() for p in model.parameters()) > memory / 2 else 'ddp'


def shard(model, device, dtype):
    """Keep 1/n of each parameter here, of gradients and optimizer state too; a block's are gathered while it works (Zhao et al.
    2023). What attention and MLP consist of travels in dtype, gradients in fp32; norms, embeddings and head stay in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def draw(model, device):
    """Give a model on the meta device the weights that GPT(config) draws, each drawn whole on the CPU and kept as far as it
    belongs here: no process ever holds a whole model that is in shards.
    """
    drawn = {}
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        model.init_weight(name, whole)
        drawn[p] = torch.nn.Parameter(shard_like(whole.to(device), p))
    model.load_state_dict({name: drawn[p] for name, p in model.named_parameters(remove_duplicate=False)}, assign=True)


def copies(model, device):
    ids = [device.index] if device.type == 'cuda' else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)  # one copy of the gradients, not two


def sync_in_backward(model, sync):
    """Whether the next backward passes exchange gradients, or only add them up here. model: of `shard` or `copies`."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync
    else:
        model.set_requires_gradient_sync(sync)


def is_shard(tensor):
    return hasattr(tensor, 'device_mesh')  # a DTensor, without importing its module


def local(tensor):
    """The part of a tensor that is here: all of it, unless it is a shard."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor):
    """All of a tensor, on every process; all have to call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole_on_main(value):
    """Nested dicts and lists with their shards gathered, one after the other, into the memory of the main process's CPU; None
    stands for them elsewhere. All processes have to call it. Other tensors stay themselves.
    """
    if is_shard(value):
        tensor = value.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {k: whole_on_main(v) for k, v in value.items()}
    return [whole_on_main(v) for v in value] if isinstance(value, list) else value


def gather_like(part, like):
    """All of a tensor of which part is here, if it is distributed like `like`; all processes have to call it."""
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def shard_like(tensor, like):
    """The shard of a whole tensor, if `like` is one; nothing is sent."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class TreeSum:
    """Sums gradients over the micro-batches of a step and over the processes in one balanced tree, the same for 1, 2, 4, ...
    processes, so that the sums are equal to the last bit.
    """

    def __init__(self, model, n_leaves):
        """n_leaves: micro-batches of a step in this process."""
        self.params = list(model.parameters())
        self.joins = joins(n_leaves)
        self.nodes, self.n = [], 0

    def add(self, loss):
        """Take the gradients of a micro-batch out of the model, and its loss."""
        self.nodes.append([*(p.grad for p in self.params), loss])
        for _ in range(self.joins[self.n]):
            right = self.nodes.pop()
            torch._foreach_add_(self.nodes[-1], right)
        self.n += 1
        for p in self.params:
            p.grad = None

    def finish(self):
        """Put the sums over the processes into the model's gradients; returns that of the loss."""
        (total,), self.nodes, self.n = self.nodes, [], 0
        n = dist.get_world_size() if dist.is_initialized() else 1
        if n > 1:
            flat = torch.cat([x.flatten() for x in total])
            theirs, distance = torch.empty_like(flat), 1
            while distance < n:  # neighbours first, as in the tree of one process; a + b is b + a
                partner = dist.get_rank() ^ distance
                sent, received = dist.P2POp(dist.isend, flat, partner), dist.P2POp(dist.irecv, theirs, partner)
                for request in dist.batch_isend_irecv([sent, received]):
                    request.wait()
                flat += theirs
                distance *= 2
            total = [x.view_as(t) for x, t in zip(flat.split([t.numel() for t in total]), total)]
        for p, gradient in zip(self.params, total):
            p.grad = gradient
        return total[-1]


def joins(n):
    """How many times the last two nodes are joined behind each of n leaves, in a tree that is halved from the top down."""
    if n == 1:
        return [0]
    left, right = joins(n // 2), joins(n - n // 2)
    return [*left, *right[:-1], right[-1] + 1]
