import pytest
import torch
from torch import Tensor, nn

from lit_methods.datamodules import SensingDataModule
from lit_methods.optim import ScaledGD
from lit_methods.sensing import AsymmetricSensing, SymmetricSensing


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors() -> tuple[nn.Parameter, nn.Parameter]:
    """Two runs of a pair with gradients."""
    f, g = nn.Parameter(random(2, 6, 3)), nn.Parameter(random(2, 5, 3, seed=1))
    (f @ g.mT - random(2, 6, 5, seed=2)).square().sum().backward()
    return f, g


def expected(x: Tensor, partner: Tensor, lr: float, damping: float) -> Tensor:
    """The formula run by run, with an inverse."""
    steps = [
        d @ torch.linalg.inv(p.T @ p + damping * torch.eye(3, dtype=p.dtype))
        for d, p in zip(x.grad, partner.detach(), strict=True)
    ]
    return x.detach() - lr * torch.stack(steps)


def test_a_step_is_the_formula_with_the_old_partner() -> None:
    f, g = factors()
    wanted = expected(f, g, 0.3, 0.2), expected(g, f, 0.3, 0.2)
    ScaledGD([f, g], lr=0.3, damping=0.2).step()
    torch.testing.assert_close((f.detach(), g.detach()), wanted)


def test_a_single_factor_is_its_own_partner() -> None:
    x, _ = factors()
    wanted = expected(x, x, 0.3, 0.0)
    ScaledGD([x], lr=0.3, damping=0.0).step()
    torch.testing.assert_close(x.detach(), wanted)


def test_groups_and_missing_gradients() -> None:
    f, g = factors()
    bias, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    bias.grad, g.grad = torch.ones(2), None
    before = g.detach().clone()
    wanted = expected(f, g, 0.3, 0.2)
    groups = [{"params": [f, g], "damping": 0.2}, {"params": [bias, head], "damping": None, "lr": 0.5}]
    ScaledGD(groups, lr=0.3).step()
    torch.testing.assert_close(f.detach(), wanted)
    assert torch.equal(g, before)
    assert bias.tolist() == [0.5, 0.5]
    assert head.tolist() == [1, 1]


def test_low_precision_is_computed_in_float32() -> None:
    f, g = factors()
    low = [nn.Parameter(p.detach().bfloat16()) for p in (f, g)]
    for p, q in zip(low, (f, g), strict=True):
        p.grad = q.grad.bfloat16()
    wanted = expected(f, g, 0.01, 0.2)
    ScaledGD(low, lr=0.01, damping=0.2).step()
    assert low[0].dtype == torch.bfloat16
    torch.testing.assert_close(low[0].double(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [AsymmetricSensing, SymmetricSensing])
def test_the_rate_is_free_of_the_condition_number(kind) -> None:
    """Exactly parameterised, from near the solution; gradient descent needs steps in proportion to the number."""
    sizes = {"size": 12} if kind is SymmetricSensing else {"rows": 12, "columns": 12}
    for condition_number in (2.0, 100.0):
        data = SensingDataModule(
            12,
            rank=2,
            measurements="entries",
            num_measurements=None,
            condition_number=condition_number,
            dtype="float64",
        )
        data.setup("fit")
        (matrix,) = data.val_data.matrix
        u, s, _ = torch.linalg.svd(matrix)
        start = u[:, :2] * s[:2].sqrt() + 0.02 * condition_number**-0.5 * random(12, 2)
        errors = []
        for make in (lambda p: ScaledGD(p, lr=0.5, damping=0.0), lambda p: torch.optim.SGD(p, lr=0.5)):
            module = kind(**sizes, factor_rank=2).double()
            for parameter in module.parameters():
                parameter.data.copy_(start)
            optimizer = make(module.parameters())
            for _ in range(60):
                optimizer.zero_grad()
                left, right = module.factors()
                residual = data.train_data.measure(left, right) - data.train_data.values
                (module.loss_factor * residual.square().mean()).backward()
                optimizer.step()
            errors.append(float((module().detach() - matrix).square().sum()))
        assert errors[0] < 1e-18
    assert errors[1] > 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_cuda_agrees() -> None:
    cpu = factors()
    gpu = [nn.Parameter(p.detach().cuda()) for p in cpu]
    for p, q in zip(gpu, cpu, strict=True):
        p.grad = q.grad.cuda()
    ScaledGD(cpu).step()
    ScaledGD(gpu).step()
    for p, q in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        ([(4, 2), (5, 3)], {}, r"params must be two factors .* got shapes \[\(4, 2\), \(5, 3\)\]"),
        ([(4, 2), (5, 2), (4, 2)], {}, "give each pair a group"),
        ([(4,)], {}, "params must be two factors"),
        ([(4, 2)], {"lr": float("nan")}, "lr must be"),
        ([(4, 2)], {"damping": -1.0}, "damping must be"),
    ],
)
def test_bad_groups(shapes, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledGD([nn.Parameter(torch.ones(shape)) for shape in shapes], **arguments)
    optimizer = ScaledGD([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape)) for shape in shapes], **arguments})
    assert len(optimizer.param_groups) == 1
