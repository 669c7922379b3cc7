"""Write a loss for YOLOX as an ONNX graph: boxes and classes count where the original sees an object.

Squared errors of all cells alike are mostly those of boxes that nobody keeps. Here, with the original's probability
`p` of an object in a cell, the loss is the sum over the cells of

    p · |box - its box|² + cross entropy of the object with p + p · cross entropies of the classes with its own

over the sum of `p`. The output of a cell is four numbers of the box, the probability of an object and those of 80
classes (Ge et al., YOLOX, arXiv 2107.08430).

    python benchmarks/yolox_loss.py yolox_loss.onnx
    onnxneutrino compress det_yolox_nano.onnx out.onnx --loss yolox_loss.onnx ...
"""

from __future__ import annotations

import sys

from onnx import parser, save

LOSS = """
<ir_version: 8, opset_import: ["": 13]>
loss (float[batch, 3549, 85] output, float[batch, 3549, 85] "teacher/output") => (float loss)
<int64[1] at0 = {0}, int64[1] at4 = {4}, int64[1] at5 = {5}, int64[1] end = {85}, int64[1] axis = {2},
 float least = {1e-6}, float most = {0.999999}, float one = {1}>
{
    box = Slice(output, at0, at4, axis)
    object = Slice(output, at4, at5, axis)
    class = Slice(output, at5, end, axis)
    box_t = Slice("teacher/output", at0, at4, axis)
    object_t = Slice("teacher/output", at4, at5, axis)
    class_t = Slice("teacher/output", at5, end, axis)

    far = Sub(box, box_t)
    squares = Mul(far, far)
    box_errors = Mul(squares, object_t)
    box_loss = ReduceSum<keepdims = 0>(box_errors)

    object_p = Clip(object, least, most)
    object_q = Sub(one, object_p)
    object_tq = Sub(one, object_t)
    object_lp = Log(object_p)
    object_lq = Log(object_q)
    object_hit = Mul(object_t, object_lp)
    object_miss = Mul(object_tq, object_lq)
    object_all = Add(object_hit, object_miss)
    object_sum = ReduceSum<keepdims = 0>(object_all)

    class_p = Clip(class, least, most)
    class_q = Sub(one, class_p)
    class_tq = Sub(one, class_t)
    class_lp = Log(class_p)
    class_lq = Log(class_q)
    class_hit = Mul(class_t, class_lp)
    class_miss = Mul(class_tq, class_lq)
    class_all = Add(class_hit, class_miss)
    class_there = Mul(class_all, object_t)
    class_sum = ReduceSum<keepdims = 0>(class_there)

    likelihood = Add(object_sum, class_sum)
    total = Sub(box_loss, likelihood)
    objects = ReduceSum<keepdims = 0>(object_t)
    loss = Div(total, objects)
}
"""


if __name__ == "__main__":
    save(parser.parse_model(LOSS), sys.argv[1])
