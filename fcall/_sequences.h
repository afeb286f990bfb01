/* What _passes.c and _scoped.c have in common: looking at arguments, and into lists and tuples. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* To be counted up, as in passes.py, when what a function takes or returns changes. */
#define REVISION 2

static int
expect(int holds, const char *what)
{
    if (!holds)
        PyErr_SetString(PyExc_TypeError, what);
    return holds;
}

/* A borrowed reference to an item of a list or a tuple; NULL, with an error, if there is none. */
static inline PyObject *
item(PyObject *sequence, Py_ssize_t i)
{
    if (i < Py_SIZE(sequence) && i >= 0)
        return PySequence_Fast_GET_ITEM(sequence, i);
    PyErr_SetString(PyExc_IndexError, "fcall: a list became shorter");
    return NULL;
}

static inline Py_ssize_t
length(PyObject *sequence)
{
    return Py_SIZE(sequence);
}

static inline int
is_sequence(PyObject *thing)
{
    return PyList_Check(thing) || PyTuple_Check(thing);
}

/* A list of the items of ``from`` with these numbers. */
static PyObject *
pick(PyObject *from, PyObject *numbers)
{
    Py_ssize_t count = length(numbers);
    PyObject *picked = PyList_New(count);
    for (Py_ssize_t i = 0; picked != NULL && i < count; i++) {
        Py_ssize_t number = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(numbers, i));
        PyObject *one = number == -1 && PyErr_Occurred() ? NULL : item(from, number);
        if (one == NULL)
            Py_CLEAR(picked);
        else
            PyList_SET_ITEM(picked, i, Py_NewRef(one));
    }
    return picked;
}
