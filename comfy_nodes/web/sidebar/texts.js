// The words of the tab, in ComfyUI's language.
import { app } from "../../../scripts/app.js";

const LANGUAGES = ["en", "zh"];
const loaded = {};

// The language that ComfyUI is set to; English for those that we don't have.
export function language() {
    const locale = String(app.extensionManager.setting.get("Comfy.Locale") ?? "en");
    return LANGUAGES.find((each) => locale === each || locale.startsWith(`${each}-`)) ?? "en";
}

// A function from a name and values to a text: t("group", { name: "fast" }).
export async function texts(name = language()) {
    if (!loaded[name]) {
        const reply = await fetch(new URL(`./${name}.json`, import.meta.url), { cache: "no-cache" });
        if (!reply.ok) throw new Error(`${name}.json: ${reply.status}`);
        loaded[name] = await reply.json();
    }
    const words = loaded[name];
    const t = (key, values = {}) => words[key].replace(/\{(\w+)\}/g, (_, each) => values[each]);
    t.language = name;
    // A state or the like that a newer daemon has keeps its own name.
    t.or = (key, otherwise) => words[key] ?? otherwise;
    return t;
}
