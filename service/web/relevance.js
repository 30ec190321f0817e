// How relevant a hit is, in words and as a number: the probability that the best hit of a query without an answer scores
// less. So "weak" hits are what any query finds.

const WORDS = [[0.99, "strong"], [0.93, "good"], [0.5, "doubtful"], [0, "weak"]];

/** A hit -> "strong match, 0.997". Without a relevance only the cosine is known; an item that was listed has neither. */
export function relevant({ relevance, score }) {
  if (typeof relevance !== "number") return score === undefined ? "" : `cosine ${score.toFixed(3)}`;
  const [, word] = WORDS.find(([least]) => relevance >= least);
  return `${word} match, ${relevance.toFixed(relevance > 0.99 ? 3 : 2)}`;
}
