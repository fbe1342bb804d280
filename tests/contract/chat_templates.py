# ruff: noqa: E501
"""Chat templates in the manners of many families, each with a few features of jinja2 that its family leans on.

They are written for these tests and are nobody's own: `chatml`, `zephyr` and the others are whose manner they are in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QWEN2_5 = (Path(__file__).parents[1] / "unit" / "server" / "qwen2_5.jinja").read_text()


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """A template and the parts of a chat that it knows, as a reader sees them."""

    source: str
    has_parts: bool = False
    has_developer: bool = False
    has_only_parts: bool = False
    """A content that is a text must be put into a list."""

    has_tools: bool = False
    has_bos: bool = False
    """The model has a token for the beginning, without which the template fails."""

    @property
    def has_calls(self) -> bool:
        return "tool_calls" in self.source


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

HANDBOOK = """
{% for message in messages %}
    {% if message.role == 'system' %}
        {{ '<|system|>' }}
        {{ message.content }}
    {% elif not loop.first %}
\t{{- message.role | upper }}: {{ message.content -}}
    {% else %}
        {{ message.role }}={{ message.content }}
    {% endif %}

{% endfor %}
{% if add_generation_prompt %}
    ASSISTANT:
{% endif %}
"""

QWEN1_5 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN2_MATH = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nReason step by step, the answer goes into \\\\boxed{}.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

CALLS = """
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
"""

TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
"""

QWQ = (
    TOOLS
    + """{%- for message in messages %}
    {%- if message.role == "assistant" and not message.tool_calls %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + content }}
        {%- endif %}"""
    + CALLS
    + """        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
"""
)

QWEN3 = (
    TOOLS
    + """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}"""
    + CALLS
    + """        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
)

QWEN3_CODER = """{% macro render_extra(value, handled=[]) %}
    {%- if value is mapping %}
        {%- for key in value if key not in handled %}
            {%- set name = key | replace("-", "_") | replace(" ", "_") %}
            {%- if value[key] is mapping %}
                {{- '\n<' ~ name ~ '>' ~ (value[key] | tojson | safe) ~ '</' ~ name ~ '>' }}
            {%- else %}
                {{- '\n<' ~ name ~ '>' ~ (value[key] | string) ~ '</' ~ name ~ '>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{% endmacro %}
{%- if tools is iterable and tools | length > 0 %}
    {%- for tool in tools %}
        {%- if tool.function is defined %}
            {%- set tool = tool.function %}
        {%- endif %}
        {{- '\n<function>\n<name>' ~ tool.name ~ '</name>' }}
        {%- for name, fields in tool.parameters.properties | items %}
            {{- '\n<parameter>' ~ name }}
            {{- render_extra(fields, ['description']) }}
            {{- '</parameter>' }}
        {%- endfor %}
        {{- '\n</function>' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is defined and message.content is string and message.content | trim | length > 0 %}
        {{- '\n' + message.content | trim }}
    {%- endif %}
    {%- if message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls | length > 0 %}
        {%- for tool_call in message.tool_calls %}
            {{- '\n<function=' + tool_call.function.name + '>\n' }}
            {%- for name, value in tool_call.function.arguments | items %}
                {{- '<parameter=' + name + '>\n' }}
                {{- value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou see.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if 'image' in content %}"
    "{% set image_count.value = image_count.value + 1 %}Picture {{ image_count.value }}"
    "{% elif 'text' in content %}{{ content['text'] }}|{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3_VL = """{%- macro render_content(content) %}
    {%- if content is string %}{{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content %}
            {%- if item.type == 'text' %}{{- item.text }}{%- endif %}
        {%- endfor %}
    {%- elif content is none or content is undefined %}{{- '' }}
    {%- else %}{{- raise_exception('Unexpected content type.') }}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + render_content(message.content) | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

R1_DISTILL = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
    "{{'<｜Assistant｜><｜calls｜>' + tool['type'] + '<｜sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + "
    "tool['function']['arguments'] + '\n' + '```'}}{%- set ns.is_first = true -%}{%- else %}"
    "{{'\n' + tool['function']['name'] + tool['function']['arguments']}}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
    "{{'<｜outputs｜>' + message['content'] + '<｜end｜>'}}{%- set ns.is_tool = false -%}{%- else %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end｜>'}}"
    "{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
    "{{'<｜output｜>' + message['content']}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)

LLAMA3_1 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today: " + date_string + "\n\n" }}
{{- system_message }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|assistant|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|ipython|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- set content = message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

HERMES = """{%- macro json_to_python_type(json_spec) %}
{%- set basic_type_map = {
    "string": "str",
    "number": "float",
    "array": "list"
} %}

{%- if basic_type_map[json_spec.type] is defined %}
    {{- basic_type_map[json_spec.type] }}
{%- elif json_spec.type == "object" %}
    {%- if json_spec.additionalProperties is defined %}
        {{- "dict[str, " + json_to_python_type(json_spec.additionalProperties) + ']'}}
    {%- else %}
        {{- "dict" }}
    {%- endif %}
{%- else %}
    {{- "Any" }}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for tool in tools or [] %}
    {%- set signature = namespace(args=[]) %}
    {%- for name, fields in tool.function.parameters.properties|items %}
        {%- set signature.args = signature.args + [name + ': ' + json_to_python_type(fields)] %}
    {%- endfor %}
    {{- tool.function.name + '(' + signature.args | join(', ') + ')\n' }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" or (message.role == "assistant" and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}"""
HERMES += CALLS
HERMES += """        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>tool\n' }}{%- endif %}
        {{- '<tool_response>\n' }}{{- message.content }}{%- if not loop.last %}{{- '\n</tool_response>\n' }}{%- else %}{{- '\n</tool_response>' }}{%- endif %}
        {%- if not loop.last and loop.nextitem.role != "tool" %}{{- '<|im_end|>' }}{%- elif loop.last %}{{- '<|im_end|>' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

COMMAND = """{{ bos_token }}{%- if documents %}{{ documents | tojson(indent=1) }}{% endif %}
{%- macro document_turn(documents) -%}
{# takes what is called twice #}
<|START|>{{ documents | length }}<|END|>
{%- endmacro %}
{%- set tool_idx = namespace(value=0) %}
{%- for message in messages %}
{%- if message.role|lower == 'system' -%}<|SYSTEM|>{{ message.content }}
{%- elif message.role|lower in ['user', 'human'] -%}<|USER|>{{ message.content }}{{ document_turn([message]) }}
{%- elif message.role|lower in ['assistant', 'chatbot'] -%}<|BOT|>
    {%- if message.tool_calls -%}
        [{% for tc in message.tool_calls %}{"id": "{{ tool_idx.value }}", "name": "{{ tc['function']['name'] }}", "parameters": {{ tc['function']['arguments']|tojson }}}{% if not loop.last %},{% endif %}{% set tool_idx.value = tool_idx.value + 1 %}{% endfor %}]
    {%- else -%}{{ message.content }}{%- endif %}
{%- elif message.role|lower == 'tool' -%}<|TOOL|>{{ message.content|default('', true) }}
{%- endif %}<|EOT|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|BOT|>{%- endif %}
"""

GPT_OSS = """{%- macro system(text) -%}
{{- "<|start|>system<|message|>" ~ text ~ "<|end|>" -}}
{%- endmacro -%}
{{- system("Now: " ~ (strftime_now("%Y") | length)) -}}
{%- set ns = namespace(developer='') -%}
{%- if messages[0].role == "developer" or messages[0].role == "system" -%}
    {%- set ns.developer = messages[0].content -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- "<|start|>developer<|message|>" ~ ns.developer ~ "<|end|>" if ns.developer -}}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "thinking" in message and message.tool_calls -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- "<|start|>assistant to=functions." ~ call.function.name ~ "<|message|>" ~ call.function.arguments|tojson ~ "<|call|>" -}}
        {%- endfor -%}
        {%- if message.content -%}{{- "<|start|>assistant<|message|>" ~ message.content ~ "<|end|>" -}}{%- endif -%}
    {%- elif message.role == 'tool' -%}
        {{- "<|start|>functions<|message|>" ~ message.content | tojson ~ "<|end|>" -}}
    {%- else -%}
        {{- "<|start|>" ~ message.role ~ "<|message|>" ~ message.content ~ "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

TRL_QWEN3 = """{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {{- content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

GENERATION_LINES = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        <a>
        {% generation %}
        {{ message.content }}
        {% endgeneration %}
        </a>
    {% else %}
<{{ message.role }}>{{ message.content }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<a>
{% endif %}
"""


def generation(begin: str, end: str) -> str:
    """ChatML with a spelling of the tags around what the assistant says."""
    return (
        "{% for m in messages %} {{ m.role }}: {% if m.role == 'assistant' %} x "
        + begin
        + " {{ m.content }} "
        + end
        + " y {% else %} {{ m.content }} {% endif %}\n {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )


SCOPES = """{% set seen = 'before' %}{% for m in messages %}
{% generation %}{% set seen = m.role %}{{ seen }}{{ loop.index if loop is defined }}{% endgeneration %}
{{ seen }}
{% endfor %}{{ seen }}{% with seen = 'inner' %}{{ seen }}{% endwith %}"""

PRINTED = """{{ true }}|{{ false }}|{{ none }}|{{ True }}|{{ 1.0 }}|{{ 10 / 4 }}|{{ 7 // 2 }}|{{ [true, none, 'a'] }}|{{ {'k': none} }}
{{ messages | length }}{{ (1, 2) }}{{ 'a' ~ true }}{{ none ~ 1 }}{{ undefined_thing }}{{ tools is none }}{{ documents is none }}
{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.missing }}{{ m.content is none }}{% endfor %}{{ add_generation_prompt }}"""

SPECIAL = """{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ bos_token is defined }}{{ pad_token is defined }}
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}{{ image_token | default('none') }}{{ sep_token }}
{%- for m in messages %}{{ m.role + m.content + (eos_token if loop.last else '') }}{% endfor %}"""

CONTROL = """{% for m in messages %}{% if loop.index > 4 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.cycle('odd', 'even') }} {{ loop.revindex }} {{ m.content }}
{%+ if loop.last %}  last{% endif +%}
{% else %}nothing{% endfor %}
{%- set pipe = joiner('; ') %}{% for m in messages %}{{ pipe() }}{{ m.role }}{% endfor %}
{%- macro wrap() %}{{ caller(1) }}{% endmacro %}{% call(x) wrap() %}[{{ x }}]{% endcall %}
{% filter upper %}shout{% endfilter %}{% raw %}{{ raw }}{% endraw %}{# a comment #}
{% set block %} kept {% endset %}<{{ block }}>
"""

JSON = """{% for m in messages %}{{ m.content | tojson }}{{ {'é': '<&>\\'', 'b': [1.0, none]} | tojson(ensure_ascii=True) }}
{{ {'b': 1, 'a': [true]} | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}{% endfor %}{{ tools | tojson }}"""

WHOLE = "{% for m in messages %}{{ m | tojson }};{% for key, value in m.items() %}{{ key }},{% endfor %}{{ m.content }}\n{% endfor %}"

METHODS = (
    "{% for m in messages %}{% set c = m.content %}{{ c.title() }}{{ c[:3] }}{{ c[::-1] }}{{ c.replace('e', '3') }}"
    "{{ c.split(' ') | first }}{{ c | length }}{{ '%s-%05d' | format(c, 3) }}{{ c in 'abc' }}{{ c | indent(2) }}"
    "{{ c | wordcount }}{{ c.strip() | e }}{{ c.startswith('H') }}{{ dict(a=c)['a'] }}{{ dict.fromkeys(['x'], c)['x'] }}{% endfor %}"
)

PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|system|>' + '\n' + message['content'] + '<|end|>' + '\n'}}{% elif (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif message['role'] == 'assistant' %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)

PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<turn>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<turn>model\n'}}{% endif %}"
)

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {{ '<turn>' + message['role'] + '\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model\n'}}{%- endif -%}
"""

ONLY_PARTS = (
    "{% for message in messages %}{{ message.role | capitalize }}{% if message.content[0].type == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}{% for line in message.content %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

VICUNA = """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% set messages = messages[1:] %}{% endif %}
{% for message in messages %}
  {% if message['role'] == 'user' %}
USER: {{ message['content'].strip() }}
  {% elif message['role'] == 'assistant' %}
ASSISTANT: {{ message['content'] }}{{ eos_token }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

ALPACA = """{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '### Instruction:\n' + message['content'] + '\n\n' -}}
{%- elif message['role'] == 'assistant' %}
{{- '### Response:\n'}}{{ message['content'] }}{{- '\n\n' -}}
{%- else %}
{{- message['content'] ~ '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\n' -}}
{%- endif %}

"""

GRANITE = """{%- set system = 'You are granite.' %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- '<|role|>system<|/role|>' + system + '<|end|>
' }}
{%- if tools and documents is none %}{{- '<|role|>tools<|/role|>' + tools | tojson(indent=4) + '<|end|>\n' }}{%- endif %}
{%- for message in loop_messages %}
{{- '<|role|>' + message['role'] + '<|/role|>' + message['content'] + '<|end|>
' }}
  {%- if loop.last and add_generation_prompt %}
{{- '<|role|>assistant' }}
            {%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}
{{- '<|/role|>' }}
  {%- endif %}
{%- endfor %}"""

OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)

FALCON = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{% if message['role'] == 'system' %}"
    "{{ 'System: ' }}{% elif message['role'] == 'user' %}{{ 'User: ' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Falcon: ' }}{% endif %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}"
    "{% endif %}"
)

GLM4 = """[gMASK]<sop>
{%- if tools -%}
<|system|>
{% for tool in tools -%}
## {{ tool.function.name }}

{{ tool.function | tojson(indent=4) }}
{% endfor -%}
{%- endif -%}
{%- macro visible_text(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{{ visible_text(m.content) }}
{%- if m.tool_calls -%}
{% for tc in m.tool_calls %}
{%- set _args = tc.function.arguments %}
{{ tc.function.name }}{% for k, v in _args.items() %}
<key>{{ k }}</key>
<value>{{ v if v is string else v | tojson(ensure_ascii=False) }}</value>
{% endfor %}
{% endfor %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}{%- endif -%}"""

MINICPM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)

INTERNLM = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM3 = """{%- set reasoning_mode = "/think" if enable_thinking is not defined or enable_thinking else "/no_think" -%}
{%- set custom_instructions = messages[0].content if messages[0].role == "system" else '' -%}
{%- if "/no_think" in custom_instructions -%}
  {%- set reasoning_mode = "/no_think" -%}
{%- endif -%}
{{- "<|im_start|>system\n## Metadata\n" -}}
{{- "Reasoning Mode: " ~ reasoning_mode ~ "\n" -}}
{{- custom_instructions -}}
{%- if xml_tools or python_tools or tools -%}
  {%- set ns = namespace(xml_tool_string="<tools>\n") -%}
  {%- for tool in (xml_tools or tools)[:] -%}
    {%- set ns.xml_tool_string = ns.xml_tool_string ~ (tool | string) ~ "\n" -%}
  {%- endfor -%}
  {{- ns.xml_tool_string + "</tools>" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\n"  + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if reasoning_mode == "/think" -%}
            {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>" + "user\n"  + content + "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\n" }}
{%- endif -%}
"""

WINDOWS = ZEPHYR.replace("\n{%", "\r\n{%").replace("%}\n", "%}\r\n")

STYLES: dict[str, Style] = {
    "chatml": Style(source=CHATML),
    "zephyr": Style(source=ZEPHYR),
    "zephyr with Windows' lines": Style(source=WINDOWS),
    "zephyr ending in lines": Style(source=ZEPHYR + "\n\n"),
    "handbook": Style(source=HANDBOOK),
    "qwen1.5": Style(source=QWEN1_5),
    "qwen2.5": Style(source=QWEN2_5, has_tools=True),
    "qwen2-math": Style(source=QWEN2_MATH),
    "qwq": Style(source=QWQ, has_tools=True),
    "qwen3": Style(source=QWEN3, has_tools=True),
    "qwen3-coder": Style(source=QWEN3_CODER, has_tools=True),
    "qwen2-vl": Style(source=QWEN2_VL, has_parts=True),
    "qwen3-vl": Style(source=QWEN3_VL, has_parts=True),
    "r1-distill": Style(source=R1_DISTILL),
    "llama2": Style(source=LLAMA2, has_bos=True),
    "llama3": Style(source=LLAMA3, has_bos=True),
    "llama3.1": Style(source=LLAMA3_1, has_tools=True),
    "mistral": Style(source=MISTRAL, has_tools=True),
    "hermes": Style(source=HERMES, has_tools=True),
    "command": Style(source=COMMAND),
    "gpt-oss": Style(source=GPT_OSS, has_developer=True),
    "smollm3": Style(source=SMOLLM3, has_tools=True),
    "trl qwen3": Style(source=TRL_QWEN3),
    "trl lines": Style(source=GENERATION_LINES),
    "trl plain": Style(source=generation("{% generation %}", "{% endgeneration %}")),
    "trl narrow": Style(source=generation("{%generation%}", "{%endgeneration%}")),
    "trl left": Style(source=generation("{%- generation %}", "{%- endgeneration %}")),
    "trl right": Style(source=generation("{% generation -%}", "{% endgeneration -%}")),
    "trl both": Style(source=generation("{%- generation -%}", "{%- endgeneration -%}")),
    "trl kept": Style(source=generation("{%+ generation %}", "{%+ endgeneration +%}")),
    "trl lines of their own": Style(source=generation("\n  {%- generation\n%}", "\n\t{% endgeneration %}\n")),
    "scopes": Style(source=SCOPES),
    "printed": Style(source=PRINTED, has_tools=True),
    "special tokens": Style(source=SPECIAL),
    "control": Style(source=CONTROL),
    "json": Style(source=JSON, has_tools=True),
    "whole messages": Style(source=WHOLE),
    "methods": Style(source=METHODS),
    "phi3": Style(source=PHI3),
    "phi4-mini": Style(source=PHI4_MINI),
    "gemma": Style(source=GEMMA),
    "gemma3": Style(source=GEMMA3, has_parts=True),
    "only parts": Style(source=ONLY_PARTS, has_parts=True, has_only_parts=True),
    "vicuna": Style(source=VICUNA),
    "alpaca": Style(source=ALPACA),
    "granite": Style(source=GRANITE, has_tools=True),
    "openchat": Style(source=OPENCHAT),
    "falcon": Style(source=FALCON),
    "glm4": Style(source=GLM4, has_tools=True, has_parts=True),
    "minicpm": Style(source=MINICPM),
    "internlm": Style(source=INTERNLM),
}
