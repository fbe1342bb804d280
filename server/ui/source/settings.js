// The region of the settings: what the person typed (`raw`, kept with the conversation), and what a request gets of it.

import { button, byId, element } from "./dom.js";
import { CheckedControl, FieldError, ParameterField } from "./field.js";
import { jsonOf, PARAMETERS } from "./parameters.js";

const EXAMPLE_TOOL = {
  name: "get_weather",
  description: "The weather in a city now",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

/** What a new conversation begins with. */
export const NO_SETTINGS = {
  model: "",
  system: "",
  tools: "",
  toolChoice: "auto",
  format: "text",
  schema: "",
  parameters: {},
};

export class Settings {
  /** `onChange` is called when the person has changed something, `onFault(error)` with the FieldError of a setting. */
  constructor(onChange, onFault) {
    this._onFault = onFault;
    this._fields = PARAMETERS.map((parameter) => {
      const field = new ParameterField(parameter);
      byId(parameter.isMore ? "more-parameters" : "parameters").append(field.element);
      return field;
    });
    this._model = byId("model");
    this._keptModel = "";
    this._system = byId("system-prompt");
    this._toolChoice = byId("tool-choice");
    this._format = byId("answer-format");
    this._tools = new CheckedControl(byId("tools"), toolsOf);
    this._schema = new CheckedControl(byId("json-schema"), schemaOf);
    byId("tools").after(this._tools.fault);
    byId("json-schema").after(this._schema.fault);
    byId("examples-of-tools").append(exampleButton("tools", EXAMPLE_TOOL));
    byId("examples-of-schemas").append(exampleButton("json-schema", EXAMPLE_SCHEMA));
    byId("settings").addEventListener("input", () => {
      this._showSchema();
      onChange();
    });
  }

  /** Follow what the server says of a mode, and show only what its requests have. */
  limitTo(limits, mode) {
    const raw = this.raw;
    for (const field of this._fields) field.limitTo(limits);
    this.raw = raw; // boxes have other defaults now
    for (const part of document.querySelectorAll("[data-modes]"))
      part.hidden = !part.dataset.modes.split(" ").includes(mode);
  }

  /** Let the person choose among the model's names and its adapters, if there are several. */
  offer(models) {
    const { model } = this;
    this._model.replaceChildren(...models.map((name) => element("option", { value: name }, name)));
    byId("model-field").hidden = models.length < 2;
    if (models.includes(model)) this._model.value = model;
  }

  /** The name that is chosen, maybe before the server has said which there are; empty if none is. */
  get model() {
    return this._model.value || this._keptModel;
  }

  get raw() {
    const parameters = this._fields.map((field) => [field.name, field.raw]).filter(([, value]) => value !== undefined);
    return {
      model: this.model,
      system: this._system.value,
      tools: this._tools.control.value,
      toolChoice: this._toolChoice.value,
      format: this._format.value,
      schema: this._schema.control.value,
      parameters: Object.fromEntries(parameters),
    };
  }

  set raw(raw) {
    const { model, system, tools, toolChoice, format, schema, parameters } = { ...NO_SETTINGS, ...raw };
    this._keptModel = model;
    if ([...this._model.options].some(({ value }) => value === model)) this._model.value = model;
    this._system.value = system;
    this._tools.control.value = tools;
    this._toolChoice.value = toolChoice;
    this._format.value = format;
    this._schema.control.value = schema;
    for (const field of this._fields) field.raw = parameters?.[field.name];
    this._showSchema();
  }

  _showSchema() {
    byId("schema-field").hidden = this._format.value !== "json_schema";
  }

  /** The settings as `requests.js` takes them, or null if one is wrong, which the person has been told then. */
  read(onFault = this._onFault) {
    try {
      return this._read();
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      onFault(error);
      return null;
    }
  }

  /** The same, but the person is left where they are. */
  readQuietly() {
    return this.read(() => {});
  }

  _read() {
    const values = this._fields.map((field) => [field.name, field.read()]).filter(([, value]) => value !== undefined);
    const hasSchema = this._format.value === "json_schema" && isInMode(this._format);
    return {
      system: this._system.value,
      tools: isInMode(this._tools.control) ? this._tools.read() : [],
      toolChoice: this._toolChoice.value,
      format: this._format.value,
      schema: hasSchema ? this._schema.read() : null,
      parameters: Object.fromEntries(values),
    };
  }
}

/** A button that fills a field as if the person had typed. */
function exampleButton(id, value) {
  const act = () => {
    byId(id).value = JSON.stringify(value, null, 2);
    byId(id).dispatchEvent(new Event("input", { bubbles: true }));
  };
  return button("Put in an example", act, { class: "bare small" });
}

/** Whether requests of the mode that is open have what a control says. */
function isInMode(control) {
  return !control.closest("[data-modes]").hidden;
}

/** One function or a list of them, bare or as tools. */
function toolsOf(text) {
  if (text.trim() === "") return [];
  const tools = [jsonOf(text)]
    .flat()
    .map((one) => (one?.function === undefined ? { type: "function", function: one } : one));
  for (const tool of tools) {
    if (typeof tool.function?.name !== "string") throw new Error("A function needs a name.");
  }
  return tools;
}

function schemaOf(text) {
  if (text.trim() === "") throw new Error("Write the answer's schema here, or choose another format.");
  return jsonOf(text);
}
