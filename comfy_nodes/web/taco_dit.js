// Shows the text of the display nodes in their bodies. Without it the text is on the console and in the history only.
import { app } from "../../scripts/app.js";

const KINDS = new Set(["TACODiTInfoDisplay", "TACODiTStatsDisplay"]);
const WIDGET = "text";
const LINE = 15;
const WIDTH = 440;

function show(node, output) {
    const text = output?.text?.[0];
    if (text === undefined) return;
    let widget = node.widgets?.find((each) => each.name === WIDGET);
    if (!widget) {
        // The frontend's own box: in every version and drawing it knows how to show a new value of it.
        widget = app.widgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
        // What is shown is no part of the graph: it is neither saved nor sent.
        widget.serialize = false;
        widget.options.serialize = false;
        // Nodes drawn by Vue go by the one, others by the other.
        widget.options.read_only = true;
        widget.element.readOnly = true;
    }
    widget.value = text;
    const height = 80 + LINE * (text.split("\n").length + 4);
    node.setSize([Math.max(node.size[0], WIDTH), Math.max(node.size[1], height)]);
    node.setDirtyCanvas?.(true, true);
}

// Ids are "7", and in subgraphs "<subgraph>:7" or "<the subgraph's node>:7".
function nodeOf(id) {
    let graph = app.rootGraph ?? app.graph;
    const path = id.split(":");
    const last = path.pop();
    for (const part of path) graph = graph?.subgraphs?.get(part) ?? find(graph, part)?.subgraph;
    return find(graph, last);
}

function find(graph, id) {
    return graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
}

app.registerExtension({
    name: "TACO-DiT.Display",
    beforeRegisterNodeDef(kind, definition) {
        if (!KINDS.has(definition.name)) return;
        const before = kind.prototype.onExecuted;
        kind.prototype.onExecuted = function (output) {
            before?.call(this, output);
            show(this, output);
        };
    },
    // A workflow that is opened again, from another tab or from the history, brings its outputs along.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) {
            const node = nodeOf(id);
            if (node && KINDS.has(node.comfyClass ?? node.type)) show(node, output);
        }
    },
});
