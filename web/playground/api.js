// What sample.py --serve has put into the page, and its API.

export const facts = JSON.parse(document.getElementById('facts').textContent);

const DOWN = 'sample.py --serve does not answer. Its terminal may say why.';

/**
 * Ask for texts. Yields {index, text, tokens, reason} as they come, and at the end {usage}. A token
 * is {text, logprob, top: [{text, logprob}, ...]}. Throws an Error of one sentence; one with the
 * name AbortError after signal.
 */
export async function* generate(path, body, signal) {
  const response = await reach(
    fetch(path, {
      method: 'POST',
      headers: {'Content-Type': 'application/json'},
      body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}}),
      signal
    })
  );
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let received = '';
  for (;;) {
    const {done, value} = await reach(reader.read());
    if (done) throw new Error(DOWN); // before [DONE]
    const events = (received + value).split('\n\n');
    received = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, '');
      if (data === '[DONE]') return;
      const {choices, usage, error} = JSON.parse(data);
      if (error) throw new Error(error.message);
      if (usage) yield {usage};
      for (const choice of choices) yield readChoice(choice);
    }
  }
}

/** A promise of fetch, whose errors are no sentences. */
async function reach(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === 'AbortError' ? error : new Error(DOWN);
  }
}

const readChoice = ({index, text, delta, logprobs, finish_reason: reason}) => ({
  index,
  text: text ?? delta.content,
  tokens: logprobs?.content ? chatTokens(logprobs.content) : textTokens(logprobs),
  reason
});

const chatTokens = content =>
  content.map(({token, logprob, top_logprobs: top}) => ({
    text: token,
    logprob,
    top: top.map(other => ({text: other.token, logprob: other.logprob}))
  }));

const textTokens = logprobs =>
  (logprobs?.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i])
      .map(([other, logprob]) => ({text: other, logprob}))
      .toSorted((a, b) => b.logprob - a.logprob) // objects put the keys 0, 1, ... first
  }));
