"""`why` on exported graphs, by its full text."""

from __future__ import annotations

import pytest
from corpus_cases import Case

from kfac_onnx.errors import UserError
from kfac_onnx.reports.why import LOOK_UP, why

WHY = {
    ("torchjoint_in__nplm_pad0", "m.emb.weight"): """
embedding
forward from 'm.emb.weight':
  Gather 'embedding' reads rows of a table of 100 by the ids 'ids'
backward from 'm.emb.weight_grad':
  ScatterElements 'm.emb.weight_grad' scatters the rows 'where_4' by the ids 'val_53', without those of padding row 0
paired:
  Gather 'embedding' gets the rows 'where_4': dL/d(rows) is 'view_3'
accepted
""",
    ("ortart_legloss__gpt_tied", "m.tok.weight"): """
embedding
forward from 'm.tok.weight':
  Gather '/m/tok/Gather_output_0' reads rows of a table of 64 by the ids 'ids'
  Transpose '/m/head/Transpose_output_0' is a view of it
    MatMul '/m/head/MatMul_output_0' uses the whole table: the rule for MatMul does not fit: '/m/lnf/LayerNormalization_output_0' is not a one-hot encoding of ids
backward from 'm.tok.weight_grad':
  Sum 'm.tok.weight_grad' adds 2 terms
    Transpose 'm.tok.weight_grad_0' is a view of the gradient
    Gemm '/m/head/Transpose_output_0_grad' is dense in the table: the rule for Gemm does not fit: none of its operands is a one-hot encoding of ids
    ScatterElements 'm.tok.weight_grad_1' scatters the rows '/m/tok/Gather_output_0_grad' by the ids 'ids'
paired:
  Gather '/m/tok/Gather_output_0' gets the rows '/m/tok/Gather_output_0_grad': dL/d(rows) is '/m/tok/Gather_output_0_grad'
  MatMul '/m/head/MatMul_output_0' gets a dense part: the table is tied
accepted
""",
    ("torchjoint_in__nplm", "m.fc.weight"): """
not an embedding
forward from 'm.fc.weight':
  Transpose 'permute' is a view of it
    Gemm 'addmm' uses the whole table: the rule for Gemm does not fit: 'view' is not a one-hot encoding of ids
backward from 'm.fc.weight_grad':
  MatMul 'm.fc.weight_grad' is dense in the table: the rule for MatMul does not fit: none of its operands is a one-hot encoding of ids
no operator looks up rows of this parameter: it is not an embedding table
""",
    ("torchjoint_initopt__identical_init", "m.emb_a.weight"): """
refused
forward from 'm.emb_a.weight':
  Gather 'embedding' reads rows of a table of 60 by the ids 'a'
  Gather 'embedding_1' reads rows of a table of 60 by the ids 'b'
backward from 'm.emb_a.weight_grad':
  ScatterElements 'm.emb_a.weight_grad' scatters the rows 'where_5' by the ids 'val_80', without those that 'bitwise_not_1' drops
refused: Gather 'embedding_1' looks rows up by the ids 'b', but its gradient 'm.emb_a.weight_grad' holds no rows of that lookup: the exporter merged two tables that started equal, or the lookup is detached
""",
    ("torchjoint_initopt__identical_init", "m.emb_b.weight"): """
refused
gradient output m.emb_b.weight_grad
refused: its gradient is computed, but the parameter is gone: the exporter folded it away
""",
    ("fwd_dyncore__gpt_tied", "head.weight"): """
embedding
forward from 'head.weight':
  Gather 'embedding' reads rows of a table of 64 by the ids 'ids'
  Transpose 'val_53' is a view of it
    MatMul 'pred' uses the whole table: the rule for MatMul does not fit: 'layer_norm_2' is not a one-hot encoding of ids
not trained: the graph has no gradients of its parameters
""",
    ("ortart_legcore__lookup_scale", "table"): """
embedding
forward from 'table':
  Mul '/Mul_output_0' is a view of it, scaled by 'gain'
    Gather '/Gather_output_0' reads rows of a table of 120 by the ids 'ids'
backward from 'table_grad':
  Identity 'table_grad' is a view of the gradient
  Mul '/Mul_Grad/PreReduceGrad0' is a view of the gradient, scaled by 'gain'
  ScatterElements '/Mul_output_0_grad' scatters the rows '/Gather_output_0_grad' by the ids 'ids'
paired:
  Gather '/Gather_output_0' gets the rows '/Gather_output_0_grad': dL/d(rows) is '/Gather_output_0_grad'
accepted
""",
    ("ortart_legloss__gpt_tied", "m.pos.weight"): """
embedding
forward from 'm.pos.weight':
  Slice '/m/pos/Gather_output_0' reads rows of a table of 8 by constant ids (every row, in order)
backward from 'm.pos.weight_grad':
  Pad 'm.pos.weight_grad' is a view of the gradient
  ReduceSum '/m/pos/Gather_output_0_grad' is dense in the table: the rule for ReduceSum does not fit: what it sums is no product with a one-hot encoding of ids
paired:
  Slice '/m/pos/Gather_output_0' gets the rows '/m/pos/Gather_output_0_grad': dL/d(rows) is '/m/pos/Gather_output_0_grad'
accepted
""",
    ("torchjoint_in__lookup_onehot", "m.table"): """
embedding
forward from 'm.table':
  MatMul 'mm' reads rows of a table of 120 by the ids 'unsqueeze'
backward from 'm.table_grad':
  MatMul 'm.table_grad' scatters the rows 'view_6' by the ids 'unsqueeze'
paired:
  MatMul 'mm' gets the rows 'view_6': dL/d(rows) is 'view_6'
accepted
""",
}
"""What `why` says of a parameter: its verdict, then what was tried at each node."""


@pytest.mark.parametrize(("graph", "parameter"), list(WHY))
def test_why_traces_what_was_tried(graph: str, parameter: str) -> None:
    found = why(Case(graph).path, parameter)
    assert "\n".join(["", found.verdict, *found.trail, ""]) == WHY[graph, parameter]
    assert found.trainable is not graph.startswith("fwd")
    if found.refusal is not None:
        assert found.trail[-1] == f"refused: {found.refusal.reason}"
        assert found.remedy == found.refusal.remedy
    if found.verdict == "not an embedding":
        assert found.remedy == LOOK_UP


@pytest.mark.parametrize(
    ("graph", "parameter", "message"),
    [
        (
            "torchjoint_in__nplm",
            "m.emb.wieght",
            "the graph has no trained parameter 'm.emb.wieght'; did you mean 'm.emb.weight'?",
        ),
        ("torchjoint_in__nplm", "ids", "'ids' is no trained parameter: it is an input without a gradient"),
        ("torchjoint_in__nplm", "view", "'view' is no trained parameter: Reshape makes it"),
        (
            "ortart_legcore__decoys",
            "frozen.weight",
            "'frozen.weight' is no trained parameter: it is a constant without a gradient",
        ),
        (
            "fwd_dyncore__gpt_tied",
            "tok.weight",
            "the graph has no trained parameter 'tok.weight'; did you mean 'pos.weight'?",
        ),
        ("fwd_dyncore__gpt_tied", "ids", "'ids' is no trained parameter: it is an input without a gradient"),
    ],
)
def test_what_is_no_parameter_is_said(graph: str, parameter: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        why(Case(graph).path, parameter)
    assert caught.value.message == message
    assert caught.value.help == "`scan MODEL` lists the trained parameters"
