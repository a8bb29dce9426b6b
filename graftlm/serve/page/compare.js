// How likely each token of an answer is to another model: scored on demand, in two requests a model.
//
// Both models read the same messages, each as its own chat template writes them, and then the very same tokens. The
// values are log-probabilities of the models themselves, before temperature and top-p, so the difference says what an
// adapter changed and not how it was sampled.

import { call } from "./api.js";

export const FULL = 3; // nats, from which on the color is full: twenty times as likely

/** {texts, own, other}: the tokens of an answer, and their log-probabilities in nats under two models. */
export async function compare(answer, models, messages, signal) {
  const asked = { model: answer.model, prompt: answer.text, add_special_tokens: false, return_token_strs: true };
  const { tokens, token_strs: texts } = await call("/tokenize", asked, signal);
  const [own, other] = await Promise.all(models.map((model) => score(model, messages, tokens, signal)));
  return { texts, own, other };
}

async function score(model, messages, tokens, signal) {
  const prompt = (await call("/tokenize", { model, messages }, signal)).tokens;
  const body = { model, prompt: [...prompt, ...tokens], echo: true, logprobs: 0, max_tokens: 0 };
  const { choices } = await call("/v1/completions", body, signal);
  if (!choices[0].logprobs) throw new Error("This server does not score the tokens of a prompt.");
  return choices[0].logprobs.token_logprobs.slice(prompt.length, prompt.length + tokens.length);
}

/** The difference of two log-probabilities as a color: its side, and its strength from 0 to 1. */
export function shade(own, other) {
  const difference = own - other;
  return { side: difference < 0 ? "less" : "more", strength: Math.min(1, Math.abs(difference) / FULL) };
}

/** What a screen reader says of a token. */
export function describe(text, own, other, [model, reference]) {
  return `${visible(text)}, ${signed(own - other)} nats; ${model} ${percent(own)}, ${reference} ${percent(other)}`;
}

/** A probability, from its log-probability in nats. */
export const percent = (value) => `${Number((100 * Math.exp(value)).toPrecision(3))} %`;

/** A token as text that can be seen. */
export const visible = (text) => text.replace(/^ | $/g, "\u2423").replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5") || "(a part of a character)";

/** The sum over the tokens, and its mean. */
export function total({ own, other }) {
  const sum = own.reduce((sum, value, i) => sum + value - other[i], 0);
  return { sum, mean: own.length ? sum / own.length : 0 };
}

export const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;
