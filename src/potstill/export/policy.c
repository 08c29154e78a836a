{% macro finish(layer, target) %}
{% if integer %}
{% set least = "0" if layer.relu else "-%d"|format(layer.most) %}
int64_t value = ((int64_t)sum * product{{ layer.number }}[o] + (INT64_C(1) << {{ layer.shift - 1 }})) >> {{ layer.shift }};
{% if layer.tanh %}
value = tanh_of(value) * {{ layer.limit }} >> 15;
{% endif %}
value = value > {{ least }} ? value : {{ least }};
{{ target }} = ({{ layer.writes }})(value < {{ layer.most }} ? value : {{ layer.most }});
{% else %}
{{ target }} = {{ "sum > 0.0f ? sum : 0.0f" if layer.relu else "tanhf(sum)" if layer.tanh else "sum" }};
{% if layer.most %}
{{ target }} = {{ target }} > -{{ layer.most }} ? {{ target }} : -{{ layer.most }};
{{ target }} = {{ target }} < {{ layer.most }} ? {{ target }} : {{ layer.most }};
{% endif %}
{% endif %}
{% endmacro %}
{% macro weights(layer) %}
{{ "int w = 0" if bits == 4 else "const %s *w = weight%d"|format("int8_t" if integer else "float", layer.number) }};
{%- if layer.sparse %} const uint8_t *gap = gap{{ layer.number }};{% endif %}
{%- endmacro %}
{% macro add_products(layer, inputs) %}
{% set weight = "nibble(weight%d, w++)"|format(layer.number) if bits == 4 else "*w++" %}
{% if layer.sparse %}
for (int i = 0, at = 0; i < count{{ layer.number }}[o]; i++) {
    at += *gap++;
    sum += {{ weight }} * {{ inputs }}[at];
}
{% else %}
for (int i = 0; i < {{ layer.inputs }}; i++)
    sum += {{ weight }} * {{ inputs }}[i];
{% endif %}
{% endmacro %}
/* {{ name }}.c: see {{ name }}.h. */
{% if (tanh or memory) and not integer %}
#include <math.h>
{% endif %}
#include "{{ name }}.h"

{{ declared }}

{% if bits == 4 %}
static int32_t nibble(const uint8_t *weights, int i) /* two to a byte, the first below; 8 is zero */
{
    return (weights[i >> 1] >> 4 * (i & 1) & 15) - 8;
}

{% endif %}
{% if tanh and integer %}
static int64_t tanh_of(int64_t x) /* in units of 1/8192, to units of 1/32767 */
{
    int64_t size = x < 0 ? -x : x, value;
    size = size > 65535 ? 65535 : size;
    value = tanh_table[size >> 8] + ((tanh_table[(size >> 8) + 1] - tanh_table[size >> 8]) * (size & 255) >> 8);
    return x < 0 ? -value : value;
}

{% endif %}
{% if view %}
static {{ wide }} seen(const {{ raw }} *x, int i) /* a number of what the policy sees of an observation */
{
    {{ wide }} sum = 0;
{% for line in view.loops %}
    {{ line }}
{% endfor %}
        sum += {{ view.sum }};
    return sum;
}

{% endif %}
static {{ unit }} input(const {{ raw }} *x, int i)
{
    float value = {{ value }};
{% for step in steps %}
    {{ step }}
{% endfor %}
    return {{ "(int16_t)(value < 0 ? value - 0.5f : value + 0.5f)" if integer else "value" }};
}

{% for layer in layers %}
{% if layer.gru %}
static void layer{{ layer.number }}(const float *x, float *memory, float *y) /* gated recurrent units */
{
    for (int o = 0; o < {{ layer.outputs }}; o++) {
        float read[3], recalled[3], reset, update, fresh;
        for (int g = 0; g < 3; g++) {
            const int row = g * {{ layer.outputs }} + o;
            read[g] = bias{{ layer.number }}[row];
            recalled[g] = recalled{{ layer.number }}[row];
            for (int i = 0; i < {{ layer.inputs }}; i++)
                read[g] += weight{{ layer.number }}[row * {{ layer.inputs }} + i] * x[i];
            for (int i = 0; i < {{ layer.outputs }}; i++)
                recalled[g] += recall{{ layer.number }}[row * {{ layer.outputs }} + i] * memory[i];
        }
        reset = 1.0f / (1.0f + expf(-read[0] - recalled[0]));
        update = 1.0f / (1.0f + expf(-read[1] - recalled[1]));
        fresh = tanhf(read[2] + reset * recalled[2]);
        y[o] = fresh + update * (memory[o] - fresh);
    }
    for (int o = 0; o < {{ layer.outputs }}; o++)
        memory[o] = y[o];
}

{% else %}
static void layer{{ layer.number }}(const {{ layer.reads }} *x, {{ layer.writes }} *y)
{
{% if layer.linear %}
    {{ weights(layer) }}
    for (int o = 0; o < {{ layer.outputs }}; o++) {
        {{ total }} sum = bias{{ layer.number }}[o];
{{ add_products(layer, "x")|trim|indent(8, first=true) }}
{{ finish(layer, "y[o]")|trim|indent(8, first=true) }}
    }
{% else %}
    {{ unit }} patch[{{ layer.inputs }}];
{% if layer.frames > 1 %}
    for (int f = 0; f < {{ layer.frames }}; f++)
{% endif %}
    for (int row = 0; row < {{ layer.high }}; row++)
        for (int column = 0; column < {{ layer.wide }}; column++) {
            const int top = row * {{ layer.down }} - {{ layer.above }}, edge = column * {{ layer.right }} - {{ layer.left }};
            {{ weights(layer) }}
            {{ unit }} *next = patch;
            for (int c = {{ "f" if layer.frames > 1 else 0 }}; c < {{ "f + 1" if layer.frames > 1 else layer.channels }}; c++)
                for (int r = top; r < top + {{ layer.height }}; r++)
                    for (int s = edge; s < edge + {{ layer.width }}; s++)
                        *next++ = {{ layer.value }};
            for (int o = 0; o < {{ layer.filters }}; o++) {
                {{ total }} sum = bias{{ layer.number }}[o];
{{ add_products(layer, "patch")|trim|indent(16, first=true) }}
{{ finish(layer, "y[(%s * %d + row) * %d + column]"|format("(f * %d + o)"|format(layer.filters) if layer.frames > 1 else "o", layer.high, layer.wide))|trim|indent(16, first=true) }}
            }
        }
{% endif %}
}

{% endif %}
{% endfor %}
static void network(const {{ raw }} *observation, {{ "float *memory, " if memory }}{{ result }} *outputs)
{
{% for key, room in rooms if room %}
    {{ unit }} {{ key }}[{{ room }}];
{% endfor %}
{% if layers[0].linear %}
    for (int i = 0; i < {{ layers[0].inputs }}; i++)
        b[i] = input(observation, i);
{% endif %}
{% for layer in layers %}
    layer{{ layer.number }}({{ layer.source }}, {{ "memory, " if layer.gru }}{{ layer.target }});
{% endfor %}
}

{{ outputs }}
{
    {{ result }} value[{{ count }}];
    network(observation, {{ passed }}value);
    for (int i = 0; i < {{ count }}; i++)
        output[i] = (float)value[i]{{ unscale }};
}

{{ signature }}
{
{% if bounded %}
    float value[{{ count }}];
    {{ prefix }}_outputs(observation, {{ passed }}value);
    for (int i = 0; i < {{ count }}; i++) {
        {{ own }} own = ({{ own }})(centre[i] + half[i] * value[i]);
        own = own > low[i] ? own : low[i];
        action[i] = own < high[i] ? own : high[i];
    }
{% else %}
    {{ result }} value[{{ count }}];
    int best = 0;
    network(observation, {{ passed }}value);
    for (int i = 1; i < {{ count }}; i++)
        if (value[i] > value[best])
            best = i;
    return actions[best];
{% endif %}
}
