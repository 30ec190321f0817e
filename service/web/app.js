// The page starts here. Each module of a tab enters what the tab does.

import { recall } from "./memory.js"; // first: it fills the fields
import "./anomaly.js";
import "./classify.js";
import "./detect.js";
import { $, on, quietly } from "./elements.js";
import "./explain.js";
import "./files.js";
import { classifiers } from "./fit.js";
import { models } from "./models.js";
import { start } from "./problems.js";
import "./search.js";
import "./segment.js";
import { submit, tab } from "./tabs.js";
import "./tag.js";

for (const id of ["labels", "vocabulary", "background", "caption"])
  on(id, "keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) quietly(submit)(event);
  });

if ($(`tab-${recall("tab")}`)) tab($(`tab-${recall("tab")}`));
start(() => Promise.all([models(), classifiers()]));
