/* {{ name }}: a policy's greedy actions, written by potstill {{ version }}.
   {{ what }}, {{ layers|length }} layer{{ "" if layers|length == 1 else "s" }}, {{ parameters }} parameters.
{% for line in told %}
   {{ line }}
{% endfor %}
   Flash: {{ needed.constants }} bytes of constants, and the code. Stack: {{ needed.activations }} bytes, and the frames of five calls. */
#ifndef {{ prefix|upper }}_H
#define {{ prefix|upper }}_H

#include <stdint.h>

#define {{ prefix|upper }}_OBSERVATION {{ size }} /* numbers, {{ shape }} in C order, raw */
#define {{ prefix|upper }}_ACTIONS {{ count }}
{% if memory %}
#define {{ prefix|upper }}_MEMORY {{ memory }} /* numbers that it keeps from call to call: all zero where a game begins */
{% endif %}

/* The greedy action, as the environment counts. */
{{ signature }};

/* The network's {{ meaning }}. */
{{ outputs }};

#endif
