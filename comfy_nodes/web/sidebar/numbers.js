// Numbers as people read them.

// Bytes in binary units, "1.5 GiB".
export function size(bytes) {
    let shown = bytes;
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
        const digits = unit === "B" || shown >= 100 ? 0 : 1;
        if (Number(shown.toFixed(digits)) < 1024 || unit === "GiB") return `${shown.toFixed(digits)} ${unit}`;
        shown /= 1024;
    }
}

// Seconds in the unit that fits, "12.3 ms".
export function seconds(value) {
    if (value < 1) return `${(value * 1000).toFixed(1)} ms`;
    return value < 100 ? `${value.toFixed(2)} s` : duration(value);
}

// The two largest units that matter, "2 h 5 min".
export function duration(value) {
    let rest = Math.floor(value);
    const parts = [];
    for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
        const count = Math.floor(rest / length);
        rest -= count * length;
        if (count || (unit === "s" && !parts.length)) parts.push(`${count} ${unit}`);
    }
    return parts.slice(0, 2).join(" ");
}

// A share of 1, "42 %".
export function percent(share) {
    return `${Math.round(share * 100)} %`;
}

// Parameters of a model, "12.0 B".
export function count(value) {
    for (const [unit, scale] of [["B", 1e9], ["M", 1e6], ["k", 1e3]]) {
        if (value >= scale) return `${(value / scale).toFixed(1)} ${unit}`;
    }
    return String(value);
}
