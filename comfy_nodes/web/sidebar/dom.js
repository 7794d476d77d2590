// A tree of elements, described as plain values and put into the page by changing as little as possible. So a button that
// has the focus keeps it, and a screen reader hears only what has changed. Text is text: nothing here parses HTML.

// Attributes that are null, undefined or false are left out. "key" tells siblings apart; names that begin with "on" are
// listeners, as onclick.
export function h(tag, attributes = {}, ...children) {
    const shown = children.flat(Infinity).filter((each) => each !== null && each !== undefined && each !== false);
    return { tag, attributes: attributes ?? {}, children: shown };
}

// Make the children of an element those that are described.
export function patch(parent, described) {
    const old = [...parent.childNodes];
    let before = parent.firstChild;
    for (const each of described) {
        const at = old.findIndex((node) => fits(node, each));
        const node = at < 0 ? create(each) : old.splice(at, 1)[0];
        update(node, each);
        if (node === before) before = node.nextSibling;
        else parent.insertBefore(node, before);
    }
    for (const node of old) node.remove();
}

function fits(node, described) {
    if (typeof described !== "object") return node.nodeType === Node.TEXT_NODE;
    const key = described.attributes.key ?? null;
    return node.nodeType === Node.ELEMENT_NODE && node.localName === described.tag && (node.tacoDitKey ?? null) === key;
}

function create(described) {
    if (typeof described !== "object") return document.createTextNode("");
    const element = document.createElement(described.tag);
    element.tacoDitKey = described.attributes.key ?? null;
    return element;
}

function update(node, described) {
    if (typeof described !== "object") {
        if (node.data !== String(described)) node.data = String(described);
        return;
    }
    const wanted = {};
    for (const [name, value] of Object.entries(described.attributes)) {
        if (name === "key" || name === "value") continue;
        if (name.startsWith("on")) node[name] = value;
        else if (value !== null && value !== undefined && value !== false) wanted[name] = value === true ? "" : String(value);
    }
    for (const { name } of [...node.attributes]) if (!(name in wanted)) node.removeAttribute(name);
    for (const [name, value] of Object.entries(wanted)) {
        if (node.getAttribute(name) !== value) node.setAttribute(name, value);
    }
    patch(node, described.children);
    // Last: a select takes only a value that one of its options has.
    const value = described.attributes.value;
    if (value !== undefined && node.value !== value) node.value = value;
}
