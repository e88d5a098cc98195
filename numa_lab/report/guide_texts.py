"""The sentences of the optimisation guide in English and Chinese, under the names by which ``guide.decide`` chooses them.

In braces stand the values of a statement. Both languages have the same sentences.
"""

from __future__ import annotations

from collections.abc import Mapping

_ENGLISH = {
    "between sentences": " ",
    "emulated title": "These times mean nothing",
    "node title": "Which node",
    "remote title": "Memory of another node",
    "threads title": "How many threads",
    "batch title": "Batches",
    "open title": "What could not be concluded",
    "commands title": "Commands for this machine",
    "not comparable": "not comparable",
    "emulated": "The processor is emulated by software: trust the placement that is shown here, and none of the times.",
    "one node": "There is one node with CPUs and memory: nothing to choose.",
    "nodes not measured": "{measured} of {nodes} nodes was measured with its own memory: run `{command}`.",
    "best node": "Node {node} is the fastest for local memory: bind there, and look for the cause (load, memory modules).",
    "nodes tie": "The {nodes} nodes tie: take any, and keep memory on it.",
    "slow nodes": "Avoid node {nodes}, shown to be slower than another; the rest could not be ranked. Keep memory on the node.",
    "nodes differ": "Nodes differ in some cases, and none is the fastest throughout: take any, and keep memory on it.",
    "nodes unclear": "The {nodes} nodes could not be told apart, nor shown to be equal (noise floor {floor}): take any, and keep "
    "memory on it.",
    "source": "Slowest against fastest local node, decode: GQA: {gqa} here, {gqa_claim} in the source guide, standard attention: "
    "{mha} here, {mha_claim} in the source guide.",
    "remote not measured": "No other node's memory was measured.",
    "no remote cost": "No cost of other nodes' memory was found above the noise floor of {floor}.",
    "remote cost": "Where a difference was shown, memory of another node, or none bound, takes {cost} times as long.",
    "one thread count": "One thread count was measured.",
    "threads": "{most} threads decode {gain} times as fast as one; {enough} come within 5 % of the best.",
    "no limit": "{sentence}",
    "limit": "{sentence}",
    "one batch size": "One batch size was measured.",
    "batch": "A batch of {largest} decodes {gain} times the tokens per second of a batch of one.",
    "batch over nodes": "Give each node whole sequences: one process per node.",
    "nothing compared": "With one binding there was nothing to compare; it was run {executions} time(s).",
    "some unclear": "{unclear} of {compared} comparisons stayed unclear with {executions} execution(s) per binding; more executions "
    "(`--profile standard`) narrow the intervals.",
    "none unclear": "{unclear} of {compared} comparisons stayed unclear with {executions} execution(s) per binding.",
}

_CHINESE = {
    "between sentences": "",
    "emulated title": "时间数据无效",
    "node title": "选择哪个节点",
    "remote title": "其他节点的内存",
    "threads title": "线程数",
    "batch title": "批量处理",
    "open title": "尚无结论的部分",
    "commands title": "本机可用的命令",
    "not comparable": "无法比较",
    "emulated": "处理器由软件模拟：这里显示的线程与内存位置可信，时间一律不可信。",
    "one node": "只有一个节点同时拥有 CPU 和内存，无需选择。",
    "nodes not measured": "{nodes} 个节点中只有 {measured} 个测量了本地内存：请运行 `{command}`。",
    "best node": "就本地内存而言节点 {node} 最快：请绑定到该节点，并查明原因（负载、内存条配置）。",
    "nodes tie": "{nodes} 个节点速度相同：任选其一，并把内存留在该节点。",
    "slow nodes": "避开节点 {nodes}：已证实慢于其他节点；其余节点未能排出先后。请把内存留在所用节点。",
    "nodes differ": "节点之间在部分情形下有差别，但没有一个始终最快：任选其一，并把内存留在该节点。",
    "nodes unclear": "{nodes} 个节点既未能区分，也未能证明相同（噪声 {floor}）：任选其一，并把内存留在该节点。",
    "source": "解码时最慢与最快本地节点之差，GQA：本机 {gqa}，原指南 {gqa_claim}，标准注意力：本机 {mha}，原指南 {mha_claim}。",
    "remote not measured": "没有测量其他节点的内存。",
    "no remote cost": "未发现超过 {floor} 噪声的跨节点开销。",
    "remote cost": "在能证实差别的情形中，使用其他节点的内存或不绑定，耗时为本地的 {cost} 倍。",
    "one thread count": "只测量了一种线程数。",
    "threads": "{most} 个线程的解码速度是单线程的 {gain} 倍；{enough} 个线程即可达到最佳时间的 5 % 以内。",
    "no limit": "没有测量解码，因此无法与内存带宽上限比较。",
    "limit": "解码达到内存读带宽上限的 {low} 至 {high}。",
    "one batch size": "只测量了一种批量。",
    "batch": "批量为 {largest} 时，每秒解码的词元数是批量为 1 时的 {gain} 倍。",
    "batch over nodes": "请把完整的序列分给各个节点：每个节点一个进程。",
    "nothing compared": "只有一种绑定，没有可比较的对象；它运行了 {executions} 次。",
    "some unclear": "每种绑定运行 {executions} 次，{compared} 个比较中有 {unclear} 个尚不明确；增加运行次数"
    "（`--profile standard`）可缩小区间。",
    "none unclear": "每种绑定运行 {executions} 次，{compared} 个比较中有 {unclear} 个尚不明确。",
}

LANGUAGES: Mapping[str, Mapping[str, str]] = {"en": _ENGLISH, "zh": _CHINESE}
