// Shows the text of the display nodes in their bodies. Without it the text is on the console and in the history only.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const KINDS = new Set(["TACODiTInfoDisplay", "TACODiTStatsDisplay"]);
const WIDGET = "text";
const LINE = 14;
const WIDTH = 420;

function show(node, output) {
    const text = output?.text?.[0];
    if (text === undefined) return;
    let widget = node.widgets?.find((each) => each.name === WIDGET);
    if (!widget) {
        widget = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
        // What is shown is no part of the graph: it is neither saved nor sent.
        widget.serialize = false;
        widget.options.serialize = false;
        widget.options.read_only = true;
        if (widget.element) widget.element.readOnly = true;
    }
    widget.value = text;
    const height = 80 + LINE * (text.split("\n").length + 4);
    node.setSize([Math.max(node.size[0], WIDTH), Math.max(node.size[1], height)]);
    node.setDirtyCanvas?.(true, true);
}

function nodeOf(id) {
    const graph = app.rootGraph ?? app.graph;
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
