"""Chat templates of the language models that MG-LLaVA was trained with (arXiv 2406.17770, section 4.1).

The conversation starts with BOS, so that a rendered prompt is the beginning of every longer conversation. Answers are
closed by EOS or a suffix, then comes the separator, and, after EOS, BOS again. Images of a user turn go to its front,
one `<image>` line each, and the rest of that turn is stripped; they may be content blocks or a literal `<image>` in
the text.

The original tokenizes every piece of a text alone: what it is given, the answer with its suffix, EOS, the separator.
A caller that wants these boundaries passes two characters: `chunk_boundary` is written before every piece that is
given and `answer_boundary` before every piece that is learned. By default nothing is written. With
`literal_image_token=False` an `<image>` within the text is left where it is.
"""

import json

_TEMPLATE = """
{%- set system_start, system_end = SYSTEM_START, SYSTEM_END -%}
{%- set user_start, user_end = USER_START, USER_END -%}
{%- set generation_prompt, suffix, separator = GENERATION_PROMPT, SUFFIX, SEPARATOR -%}
{%- set closed_by_eos = CLOSED_BY_EOS -%}
{%- set given = chunk_boundary | default('') -%}
{%- set learnt = answer_boundary | default('') -%}
{%- set state = namespace(system='', text='', images=0, expected='user') -%}
{%- if tools -%}
  {{- raise_exception('This model was not trained with tools: `tools` must be empty.') -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set state.text = '' -%}
  {%- set state.images = 0 -%}
  {%- if message['content'] is string -%}
    {%- set state.text = message['content'] -%}
  {%- elif message['content'] is undefined or message['content'] is none -%}
    {{- raise_exception('`content` must be a string or a list of blocks, message ' ~ loop.index ~ ' has none.') -}}
  {%- else -%}
    {%- for block in message['content'] -%}
      {%- if block['type'] == 'text' -%}
        {%- set state.text = state.text + block['text'] -%}
      {%- elif block['type'] in ['image', 'image_url'] and message['role'] == 'user' -%}
        {%- set state.images = state.images + 1 -%}
      {%- elif block['type'] in ['image', 'image_url'] -%}
        {{- raise_exception('Images must be in user turns, got one in a message of role ' ~ message['role'] ~ '.') -}}
      {%- else -%}
        {{- raise_exception("Content blocks must be 'text' or 'image', got '" ~ block['type'] ~ "'.") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {%- set state.system = system_start + state.text + system_end -%}
  {%- elif message['role'] != state.expected -%}
    {{- raise_exception('Turns must alternate user, assistant, user, ... after an optional system message, got ' ~
                        message['role'] ~ ' as message ' ~ loop.index ~ '.') -}}
  {%- elif message['role'] == 'user' -%}
    {%- if literal_image_token | default(true) -%}
      {%- set state.images = state.images + state.text.count('<image>') -%}
      {%- set state.text = state.text.replace('<image>', '') -%}
    {%- endif -%}
    {%- if state.images -%}
      {%- set state.text = ('<image>\\n' * state.images + state.text.strip()).strip() -%}
    {%- endif -%}
    {%- set is_first_turn = loop.index0 == (1 if state.system else 0) -%}
    {%- if is_first_turn or closed_by_eos -%}
      {{- bos_token or "" -}}
    {%- endif -%}
    {{- given + (state.system if is_first_turn else '') + user_start + state.text + user_end -}}
    {%- if not loop.last or add_generation_prompt -%}
      {{- generation_prompt -}}
    {%- endif -%}
    {%- set state.expected = 'assistant' -%}
  {%- else -%}
    {%- generation -%}
      {{- learnt + state.text + suffix -}}
      {%- if closed_by_eos -%}
        {{- learnt ~ eos_token -}}
      {%- endif -%}
    {%- endgeneration -%}
    {{- given + separator + given -}}
    {%- set state.expected = 'user' -%}
  {%- endif -%}
{%- endfor -%}
"""


def _template(
    *,
    system: tuple[str, str],
    user: tuple[str, str],
    generation_prompt: str,
    suffix: str = "",
    separator: str = "",
    closed_by_eos: bool = False,
) -> str:
    """Fill in the fields of one family; a JSON string is a Jinja string too."""
    fields = {
        "SYSTEM_START": json.dumps(system[0]),
        "SYSTEM_END": json.dumps(system[1]),
        "USER_START": json.dumps(user[0]),
        "USER_END": json.dumps(user[1]),
        "GENERATION_PROMPT": json.dumps(generation_prompt),
        "SUFFIX": json.dumps(suffix),
        "SEPARATOR": json.dumps(separator),
        "CLOSED_BY_EOS": json.dumps(closed_by_eos),
    }
    template = _TEMPLATE
    for name, value in fields.items():
        template = template.replace(name, value)
    return template.strip()


CHAT_TEMPLATES: dict[str, str] = {
    # Vicuna-1.5
    "vicuna": _template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. ",
            "\n ",
        ),
        user=("USER: ", ""),
        generation_prompt=" ASSISTANT:",
        separator="\n",
        closed_by_eos=True,
    ),
    # Llama-3-Instruct
    "llama3": _template(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        suffix="<|eot_id|>",
    ),
    # Phi-3-mini
    "phi3": _template(
        system=("<|system|>", "<|end|>\n"),
        user=("<|user|>", "<|end|>\n"),
        generation_prompt="<|assistant|>\n",
        suffix="<|end|>",
        separator="\n",
    ),
    # Yi-1.5-Chat (ChatML; the original calls it `qwen_chat`)
    "yi": _template(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        generation_prompt="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        separator="\n",
    ),
}
