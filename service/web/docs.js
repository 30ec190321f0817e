// The API's reference, made of /openapi.json: operations by tag, then the schemas.

import { copy, curl } from "./commands.js";
import { $, make, on } from "./elements.js";
import { start } from "./problems.js";
import { ask } from "./requests.js";

const JSON_TYPE = "application/json";
let spec;

/** Text with `code` in it -> elements. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));
const paragraphs = (text = "") => text.split(/\n\s*\n/).filter(Boolean).map((part) => make("p", {}, ...prose(part)));

/** Reference -> [name, what it refers to]. */
function referred(ref) {
  const path = ref.replace("#/", "").split("/");
  return [path.at(-1), path.reduce((part, name) => part[name], spec)];
}

const resolved = (schema) => (schema.$ref ? referred(schema.$ref)[1] : schema);

// ---- what a value may be

const LIMITS = [
  ["minimum", "at least"], ["exclusiveMinimum", "above"], ["maximum", "at most"], ["exclusiveMaximum", "below"],
  ["minLength", "characters at least"], ["maxLength", "characters at most"], ["minItems", "entries at least"],
  ["maxItems", "entries at most"], ["pattern", "pattern"], ["format", "format"], ["default", "default"],
];

/** The limits of a schema as text, without what says nothing. */
const limits = (schema) =>
  LIMITS.filter(([name]) => ![undefined, null, ""].includes(schema[name]) && !(name === "default" && typeof schema[name] === "object"))
    .map(([name, text]) => `${text} ${schema[name]}`)
    .join(", ");

/** A schema -> elements that say what a value may be. */
function kind(schema) {
  if (schema.$ref) return [make("a", { href: `#${referred(schema.$ref)[0]}` }, referred(schema.$ref)[0])];
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices && !schema.properties) return choices.flatMap((choice, i) => (i ? [" or ", ...kind(choice)] : kind(choice)));
  if (schema.const !== undefined) return [make("code", {}, JSON.stringify(schema.const))];
  if (schema.enum) return schema.enum.flatMap((value, i) => [i ? " or " : "", make("code", {}, JSON.stringify(value))]);
  if (schema.type === "array") return ["list of ", ...kind(schema.items ?? {})];
  if (schema.properties) return ["object: ", ...Object.keys(schema.properties).flatMap((name, i) => [i ? ", " : "", make("code", {}, name)])];
  if (schema.additionalProperties) return ["object of ", ...kind(schema.additionalProperties)];
  return [schema.format === "binary" ? "file" : [schema.type ?? "any value"].flat().join(" or ")];
}

/** [name, schema, required, description] of each -> a table. */
function table(label, rows) {
  const head = ["name", "value", "meaning"].map((text) => make("th", { scope: "col" }, text));
  const body = rows.map(([name, schema, required, description = schema.description]) => {
    const bounds = limits(schema);
    const value = [...kind(schema), ...(bounds ? [make("br"), make("small", {}, bounds)] : [])];
    return make("tr", {}, make("th", { scope: "row" }, name, required ? " *" : ""), make("td", {}, ...value), make("td", {}, ...prose(description ?? "")));
  });
  return make("div", { className: "table", tabIndex: 0, role: "group", ariaLabel: label }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

const properties = (label, { properties = {}, required = [] }) =>
  table(label, Object.entries(properties).map(([name, schema]) => [name, schema, required.includes(name)]));

// ---- operations

/** A command that can be copied. */
function command(text) {
  const pre = make("pre", { tabIndex: 0, role: "group", ariaLabel: "Example" }, text);
  const done = make("output");
  const button = make("button", { type: "button", onclick: async () => (done.value = await copy(pre)) }, "Copy as curl");
  return [pre, make("div", { className: "copies" }, button, done)];
}

/** The example of a request; a name in the path is in capital letters. */
function example(verb, path, { security, requestBody }) {
  const content = requestBody?.content ?? {};
  const [type] = Object.keys(content);
  const given = content[JSON_TYPE]?.example;
  const body = given ?? (type && type !== JSON_TYPE ? new File([], "FILE", { type }) : undefined);
  const address = path.slice(1).replace(/{(\w+)(:\w+)?}/g, (_, name) => name.toUpperCase());
  return command(curl({ method: verb.toUpperCase(), path: address, body }, Boolean(security)));
}

function bodies({ required, content }) {
  const types = Object.entries(content);
  const whole = (type, schema) => {
    const named = schema.$ref ? [" ", ...kind(schema)] : [];
    const fields = resolved(schema).properties ? [properties(`Fields, ${type}`, resolved(schema))] : [];
    return [make("h4", {}, `Body${required ? " *" : ""}: ${type}`, ...named), ...paragraphs(resolved(schema).description), ...fields];
  };
  const [first, ...others] = types.filter(([, { schema }]) => schema.format !== "binary");
  const raw = types.filter(([, { schema }]) => schema.format === "binary").map(([type]) => type);
  const parts = first ? whole(first[0], first[1].schema) : [];
  for (const [type, { schema }] of others)
    parts.push(make("details", {}, make("summary", {}, `Body as ${type}`), ...whole(type, schema)));
  if (raw.length) parts.push(make("p", {}, first ? "Or the bytes of a file, as " : "Body: the bytes of a file, as ", ...raw.flatMap((type, i) => [i ? ", " : "", make("code", {}, type)]), "."));
  return parts;
}

function answers(responses) {
  const rows = Object.entries(responses).map(([status, { description, content = {} }]) => {
    const found = Object.entries(content).map(([type, { schema = {} }]) => make("div", {}, ...(type === JSON_TYPE || schema.$ref ? kind(schema) : [type])));
    const slugs = Number(status) < 400 || !/^[a-z, -]+$/.test(description) ? prose(description) : description.split(", ").flatMap((slug, i) => [i ? ", " : "", make("a", { href: `problems/${slug}` }, slug)]);
    return make("tr", {}, make("th", { scope: "row" }, status), make("td", {}, ...found), make("td", {}, ...slugs));
  });
  return make("div", { className: "table", tabIndex: 0, role: "group", ariaLabel: "Answers" }, make("table", {}, make("tbody", {}, ...rows)));
}

function operation(path, verb, details) {
  const { operationId: id, summary, description, parameters = [], requestBody, responses, security } = details;
  const needs = security ? `Needs a key for ${Object.values(security[0]).flat().join(", ")}.` : "";
  const heading = make("h3", {}, make("a", { href: `#${id}` }, make("b", { className: "verb" }, verb.toUpperCase()), ` ${path}`));
  const element = make("article", { id }, heading, make("p", {}, make("strong", {}, summary ?? "")), ...paragraphs(description));
  if (needs) element.append(make("p", {}, make("small", {}, needs)));
  if (requestBody) element.append(...bodies(requestBody));
  if (parameters.length) {
    const rows = parameters.map((one) => [one.name, one.schema ?? one.content?.[JSON_TYPE]?.schema ?? {}, one.required, `${one.in}: ${one.description ?? one.schema?.description ?? ""}`.replace(/: $/, "")]);
    const raw = requestBody && parameters.every((one) => one.in === "query"); // the same fields as in the body
    const what = raw ? "Parameters, beside the bytes of a picture" : "Parameters";
    element.append(raw ? make("details", {}, make("summary", {}, what), table(what, rows)) : make("div", {}, make("h4", {}, what), table(what, rows)));
  }
  element.append(make("h4", {}, "Example"), ...example(verb, path, details), make("h4", {}, "Answers"), answers(responses));
  return element;
}

function schema([name, schema]) {
  const heading = make("h3", {}, make("a", { href: `#${name}` }, name));
  const fields = schema.properties ? properties(`Fields of ${name}`, schema) : make("p", {}, ...kind(schema));
  return make("article", { id: name }, heading, ...paragraphs(schema.description), fields);
}

// ---- the page

const group = (title, articles) => make("section", { ariaLabel: title }, make("h2", {}, title[0].toUpperCase() + title.slice(1)), ...articles);

function contents() {
  const lists = [...document.querySelectorAll("#reference section")].map((section) => {
    const links = [...section.querySelectorAll("article")].map((article) => {
      const link = make("a", { href: `#${article.id}` }, article.querySelector("h3").textContent);
      return make("li", { article }, link);
    });
    return make("div", { section }, make("h2", {}, section.ariaLabel), make("ul", {}, ...links));
  });
  $("contents").replaceChildren(...lists);
}

/** Hide what lacks one of the words. */
function filter() {
  const words = $("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.querySelectorAll("#contents li")];
  for (const row of rows) row.hidden = row.article.hidden = !words.every((word) => row.article.textContent.toLowerCase().includes(word));
  for (const list of $("contents").children) list.hidden = list.section.hidden = [...list.querySelectorAll("li")].every((row) => row.hidden);
  scrollTo(0, 0);
  $("count").value = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
}

async function load() {
  spec = (await ask("GET", "openapi.json")).data;
  $("version").textContent = spec.info.version;
  const tags = new Map();
  for (const [path, verbs] of Object.entries(spec.paths))
    for (const [verb, details] of Object.entries(verbs)) {
      const [tag = "other"] = details.tags ?? [];
      tags.set(tag, [...(tags.get(tag) ?? []), operation(path, verb, details)]);
    }
  const sections = [...tags].map(([tag, operations]) => group(tag, operations));
  $("reference").replaceChildren($("problem"), ...sections, group("schemas", Object.entries(spec.components.schemas).map(schema)));
  contents();
  filter();
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

if (matchMedia("(max-width: 56rem)").matches) $("menu").open = false; // else the list hides the reference on a phone
on("words", "input", filter);
start(load);
