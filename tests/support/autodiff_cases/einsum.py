"""Cases of Einsum."""

from __future__ import annotations

from autodiff_cases import Case, floats

EQUATIONS = {
    "matmul": ("ij,jk->ik", (3, 4), (4, 5)),
    "turned": ("ij,kj->ki", (3, 4), (5, 4)),
    "heads": ("bthd,bshd->bhts", (2, 3, 2, 4), (2, 5, 2, 4)),
    "batch": ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    "outer": ("i,j->ij", (3,), (4,)),
    "dot": ("i,i->", (4,), (4,)),
    "weights": ("bd,vd->bv", (2, 3), (5, 3)),
    "implicit": ("ij,jk", (3, 4), (4, 5)),
    "implicit_order": ("ba,bc", (3, 4), (3, 5)),
    "alone": ("ij,k->k", (3, 4), (5,)),
    "alone_in_one": ("ijm,jk->ik", (3, 4, 2), (4, 5)),
    "dots": ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)),
    "dots_of_one": ("...ij,...jk->...ik", (2, 1, 3, 4), (1, 6, 4, 5)),
    "dots_implicit": ("...ij,jk", (2, 3, 4), (4, 5)),
    "spaces": (" i j , j k -> i k ", (3, 4), (4, 5)),
}
SINGLE = {
    "turn": ("ij->ji", (3, 4)),
    "sum": ("ij->i", (3, 4)),
    "total": ("ij->", (3, 4)),
    "same": ("ij->ij", (3, 4)),
    "dots": ("...ij->...ji", (2, 3, 4)),
}
CASES = [
    *(
        Case(
            f"einsum_{name}",
            f'z = Einsum<equation: string = "{equation}">(x, y)',
            f'torch.einsum("{equation}", x, y)',
            {"x": floats(*a), "y": floats(*b)},
            symbolic="of_one" not in name,
        )
        for name, (equation, a, b) in EQUATIONS.items()
    ),
    *(
        Case(
            f"einsum_single_{name}",
            f'y = Einsum<equation: string = "{equation}">(x) z = Mul(y, y)',
            f'torch.einsum("{equation}", x) ** 2',
            {"x": floats(*a)},
        )
        for name, (equation, a) in SINGLE.items()
    ),
    Case(
        "einsum_three",
        'z = Einsum<equation: string = "ij,jk,kl->il">(x, y, w)',
        'torch.einsum("ij,jk,kl->il", x, y, w)',
        {"x": floats(3, 4), "y": floats(4, 2), "w": floats(2, 5)},
    ),
]
