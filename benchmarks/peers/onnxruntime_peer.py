"""ONNX Runtime on its CPU provider, its model a graph written from the checkpoint.

The graph has the operators that ONNX Runtime's own tools fuse GPT-2 to, and one for prompts and
single tokens. Its attention is GroupQueryAttention, which appends to keys and values in place; they
stay float32. The next token is chosen in the graph, and memory of ours is bound to all inputs and
outputs, so that a step copies nothing. int8 is ONNX Runtime's dynamic quantization, weights by
channel. Its CPU provider has no bfloat16 products.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from worker import Generate, Ids, Job

PRECISIONS = ("float32", "int8")
DEVICES = ("cpu",)
MODEL = "model.onnx"
FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]


def version() -> str:
    return str(onnxruntime.__version__)


def load(job: Job) -> Generate:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(
        str(job.scratch / MODEL), options, providers=["CPUExecutionProvider"]
    )
    cache = KVCache(_config(job.folder), job.batch, job.max_len)

    def generate(prompts: Ids, new_tokens: int) -> Ids:
        drawn = np.empty((len(prompts), 1), np.int64)
        found = np.empty((len(prompts), new_tokens), np.int64)
        prefill = Step(session, cache, np.array(prompts, np.int64), drawn)
        decode = Step(session, cache, drawn, drawn)
        cached = 0
        for index in range(new_tokens):
            step = decode if index else prefill
            step.run(cached)
            cached += step.num_tokens
            found[:, index] = drawn[:, 0]
        return found.tolist()

    return generate


class KVCache:
    """Keys and values of all layers, in memory for `batch` rows of `max_len` tokens."""

    def __init__(self, config: dict[str, Any], batch: int, max_len: int) -> None:
        self._heads, self._max_len = config["n_head"], max_len
        self._head_dim = config["n_embd"] // config["n_head"]
        row = self._heads * max_len * self._head_dim
        self._memory = {
            f"{kind}_{layer}": np.zeros(batch * row, np.float32)
            for layer in range(config["n_layer"])
            for kind in ("key", "value")
        }

    def bind(self, binding: Any, batch: int) -> None:
        """To the inputs and outputs of a step: the same memory, so that nothing is copied."""
        shape = (batch, self._heads, self._max_len, self._head_dim)
        for name, memory in self._memory.items():
            about = ("cpu", 0, np.float32, shape, memory.ctypes.data)
            binding.bind_input(f"past_{name}", *about)
            binding.bind_output(f"present_{name}", *about)


class Step:
    """One that reads the ids in `new`, (batch, tokens), and writes the next into `drawn`."""

    def __init__(self, session: Any, cache: KVCache, new: Array, drawn: Array) -> None:
        batch, self.num_tokens = new.shape
        self._session, self._binding = session, session.io_binding()
        self._inputs = {
            "input_ids": new,
            "position_ids": np.empty(self.num_tokens, np.int64),
            "last_positions": np.empty(batch, np.int32),
            "total_length": np.empty(1, np.int32),
        }
        for name, values in self._inputs.items():  # bound as memory: what it holds may change
            self._binding.bind_cpu_input(name, values)
        self._binding.bind_output("drawn", "cpu", 0, np.int64, drawn.shape, drawn.ctypes.data)
        cache.bind(self._binding, batch)

    def run(self, cached: int) -> None:
        """With so many tokens of each row in the cache."""
        total = cached + self.num_tokens
        self._inputs["position_ids"][:] = np.arange(cached, total)
        self._inputs["last_positions"][:] = total - 1
        self._inputs["total_length"][:] = total
        self._session.run_with_iobinding(self._binding)


def convert(job: Job) -> None:
    model = write_graph(_config(job.folder), load_file(job.folder / "model.safetensors"))
    path = str(job.scratch / MODEL)
    if job.precision == "float32":
        beside = {"save_as_external_data": True, "location": f"{MODEL}.data"}  # has no bound
        onnx.save_model(model, path, **beside)
        return
    from onnxruntime.quantization import quantize_dynamic

    options = {"DefaultTensorType": TensorProto.FLOAT}  # of what fused operators make
    quantize_dynamic(
        model, path, per_channel=True, use_external_data_format=True, extra_options=options
    )


def write_graph(config: dict[str, Any], tensors: Tensors) -> onnx.ModelProto:
    """Ids (batch, tokens), and keys and values, to the most likely next ids (batch, 1)."""
    graph = Graph(config, tensors)
    graph.write()
    ids = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", "tokens")),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ("tokens",)),
        helper.make_tensor_value_info("last_positions", TensorProto.INT32, ("batch",)),
        helper.make_tensor_value_info("total_length", TensorProto.INT32, (1,)),
    ]
    drawn = helper.make_tensor_value_info("drawn", TensorProto.INT64, ("batch", 1))
    made = helper.make_graph(
        graph.nodes,
        "gpt2",
        [*ids, *_kv_infos("past", config)],
        [drawn, *_kv_infos("present", config)],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def _kv_infos(prefix: str, config: dict[str, Any]) -> Iterator[onnx.ValueInfoProto]:
    heads = config["n_head"]
    shape = ("batch", heads, "max_len", config["n_embd"] // heads)
    for layer in range(config["n_layer"]):
        for kind in ("key", "value"):
            name = f"{prefix}_{kind}_{layer}"
            yield helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class Graph:
    """Nodes and weights. A value has its node's name; hidden states are (batch, tokens, hidden)."""

    def __init__(self, config: dict[str, Any], tensors: Tensors) -> None:
        self._config, self._tensors = config, tensors
        self._epsilon = config.get("layer_norm_epsilon", 1e-5)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def write(self) -> None:
        tokens = self._node("Gather", "tokens", self._weight("wte.weight"), "input_ids")
        positions = self._node("Gather", "positions", self._weight("wpe.weight"), "position_ids")
        hidden = self._node("Add", "embedded", tokens, positions)
        normed = self._node(
            "LayerNormalization", "h.0.ln_1", hidden, *self._norm("h.0.ln_1"),
            epsilon=self._epsilon,
        )  # fmt: skip
        num_layers = self._config["n_layer"]
        for layer in range(num_layers):
            after = "ln_f" if layer + 1 == num_layers else f"h.{layer + 1}.ln_1"
            normed, hidden = self._layer(layer, normed, hidden, after)
        last = self._node("Gather", "last", normed, self._constant("end", [-1]), axis=1)
        head = self._tensors.get("lm_head.weight", self._tensors["wte.weight"])
        logits = self._node("MatMul", "logits", last, self._constant("head", head.T))
        self._node("ArgMax", "drawn", logits, axis=2, keepdims=0)  # (batch, 1, vocab) -> (batch, 1)

    def _layer(self, layer: int, normed: str, hidden: str, after: str) -> tuple[str, str]:
        """`normed` is its first norm's; what comes back is that of `after`, and the sum."""
        name = f"h.{layer}"
        product = self._product(f"{name}.attn.c_attn", normed)
        qkv = self._node("Add", f"{name}.qkv", product, self._weight(f"{name}.attn.c_attn.bias"))
        attended = self._attention(layer, qkv)
        projected = self._product(f"{name}.attn.c_proj", attended)
        normed, hidden = self._add_norm(f"{name}.attn.c_proj", projected, hidden, f"{name}.ln_2")
        widened = self._product(f"{name}.mlp.c_fc", normed)
        bias = self._weight(f"{name}.mlp.c_fc.bias")
        active = self._node("FastGelu", f"{name}.mlp.act", widened, bias, domain=FUSED)
        narrowed = self._product(f"{name}.mlp.c_proj", active)
        return self._add_norm(f"{name}.mlp.c_proj", narrowed, hidden, after)

    def _attention(self, layer: int, qkv: str) -> str:
        heads, kinds = self._config["n_head"], (f"key_{layer}", f"value_{layer}")
        found = f"h.{layer}.attended"
        past, present = ([f"{when}_{kind}" for kind in kinds] for when in ("past", "present"))
        inputs = [qkv, "", "", *past, "last_positions", "total_length"]
        self._add(
            "GroupQueryAttention", inputs, [found, *present], domain=FUSED,
            num_heads=heads, kv_num_heads=heads,
        )  # fmt: skip
        return found

    def _add_norm(self, linear: str, made: str, hidden: str, norm: str) -> tuple[str, str]:
        """What a linear layer has made, with its bias, is added to the hidden states; the norm of
        the sum, and the sum."""
        inputs = [made, hidden, *self._norm(norm), self._weight(f"{linear}.bias")]
        outputs = [norm, "", "", f"{linear}.sum"]
        self._add("SkipLayerNormalization", inputs, outputs, domain=FUSED, epsilon=self._epsilon)
        return norm, outputs[-1]

    def _product(self, name: str, value: str) -> str:
        return self._node("MatMul", name, value, self._weight(f"{name}.weight"))

    def _norm(self, name: str) -> tuple[str, str]:
        return self._weight(f"{name}.weight"), self._weight(f"{name}.bias")

    def _weight(self, name: str) -> str:
        return self._constant(name, self._tensors[name])

    def _constant(self, name: str, values: Array | Sequence[int]) -> str:
        stored = np.ascontiguousarray(values)
        self.initializers.append(numpy_helper.from_array(stored, name))
        return name

    def _node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self._add(kind, inputs, [name], **attributes)
        return name

    def _add(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], **attributes))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
