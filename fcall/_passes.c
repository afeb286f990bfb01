/* The functions of passes.py, in C: that file says what each is for, and has the same in Python.

   None of them knows torch: they look at dicts, lists and weak references. What is not of the plain
   kind they are made for (a subclass of dict, say) they leave to Python, before anything is
   changed.

   Not built against the stable ABI, where each look into a list is a call, and takes twice as long.
*/

#include "_sequences.h"

/* Set once, never freed: "_parameters", "_buffers" and "_modules". */
static PyObject *stores[3];

/* Whether two keys are the same. They nearly always are one object. No code of Python's runs. */
static inline int
same_key(PyObject *one, PyObject *other)
{
    return one == other || (PyUnicode_CheckExact(one) && PyUnicode_CheckExact(other) &&
                            PyUnicode_Compare(one, other) == 0);
}

/* A new reference to what a weak reference is to, None if that is gone; NULL with an error. */
static inline PyObject *
referent(PyObject *reference)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *found;
    int outcome = PyWeakref_GetRef(reference, &found);
    return outcome == 0 ? Py_NewRef(Py_None) : found;
#else
    return Py_XNewRef(PyWeakref_GetObject(reference));
#endif
}

/* Put the dict of an owner, and what is in it, where look() collects them.

   Return 1; 0 if keys or values are not those expected; -1 with an error; -2 if it is no dict. */
static int
look_at_store(PyObject *vars, int kind, PyObject *own_dict, Py_ssize_t expected, PyObject *keys,
              PyObject **ids, PyObject *dicts, Py_ssize_t number, PyObject *held, Py_ssize_t *at)
{
    PyObject *store = PyDict_GetItemWithError(vars, stores[kind]), *key, *value;
    if (store == NULL)
        return PyErr_Occurred() ? -1 : -2;
    Py_INCREF(store);
    if (!PyDict_CheckExact(store) && own_dict != Py_None) {
        PyObject *scoped = store;
        store = PyObject_CallFunctionObjArgs(own_dict, scoped, NULL);
        Py_DECREF(scoped);
        if (store == NULL)
            return -1;
    }
    PyList_SET_ITEM(dicts, number, store); /* which has the reference now */
    if (!PyDict_CheckExact(store))
        return -2;
    if (PyDict_GET_SIZE(store) != expected || *at + expected > PyList_GET_SIZE(held))
        return 0;
    for (Py_ssize_t position = 0; PyDict_Next(store, &position, &key, &value); ++*at) {
        if (ids[*at] != value || !same_key(key, PyTuple_GET_ITEM(keys, *at)))
            return 0;
        PyList_SET_ITEM(held, *at, Py_NewRef(value));
    }
    return 1;
}

static PyObject *
look_in_python(PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *passes = PyImport_ImportModule("fcall.passes"), *packed = PyTuple_New(nargs);
    PyObject *twin = passes ? PyObject_GetAttrString(passes, "look_in_python") : NULL;
    for (Py_ssize_t i = 0; packed != NULL && i < nargs; i++)
        PyTuple_SetItem(packed, i, Py_NewRef(args[i]));
    PyObject *found = twin && packed ? PyObject_CallObject(twin, packed) : NULL;
    Py_XDECREF(passes);
    Py_XDECREF(packed);
    Py_XDECREF(twin);
    return found;
}

static PyObject *
look(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int are_tuples = nargs == 8 || nargs == 9;
    for (int i = 0; are_tuples && i < 8; i++)
        are_tuples = i == 3 ? PyBytes_Check(args[i]) : PyTuple_Check(args[i]);
    if (!expect(are_tuples && PyTuple_Size(args[1]) == 3 * PyTuple_Size(args[0]) &&
                    PyBytes_Size(args[3]) ==
                        PyTuple_Size(args[2]) * (Py_ssize_t)sizeof(PyObject *),
                "look() takes references, lengths, keys, ids, four tuples of numbers, own_dict"))
        return NULL;
    PyObject *references = args[0], *lengths = args[1], *keys = args[2];
    PyObject *own_dict = nargs == 9 ? args[8] : Py_None;
    PyObject **ids = (PyObject **)PyBytes_AsString(args[3]);
    Py_ssize_t owner_count = PyTuple_Size(references), count = PyTuple_Size(keys), at = 0;
    PyObject *owners = PyList_New(owner_count), *dicts = PyList_New(3 * owner_count);
    PyObject *held = PyList_New(count), *found = NULL;
    int outcome = owners && dicts && held ? 1 : -1;
    for (Py_ssize_t i = 0; i < owner_count && outcome == 1; i++) {
        PyObject *reference = PyTuple_GET_ITEM(references, i);
        if (!PyWeakref_Check(reference)) {
            outcome = expect(0, "look() takes weak references") - 1;
            break;
        }
        PyObject *owner = referent(reference);
        if (owner == NULL) {
            outcome = -1;
            break;
        }
        PyList_SET_ITEM(owners, i, owner); /* which has the reference now */
        if (owner == Py_None) {
            outcome = 0;
            break;
        }
        PyObject *vars = PyObject_GenericGetDict(owner, NULL);
        if (vars == NULL || !PyDict_Check(vars)) {
            PyErr_Clear();
            Py_XDECREF(vars);
            outcome = -2;
            break;
        }
        for (int kind = 0; kind < 3 && outcome == 1; kind++) {
            Py_ssize_t expected = PyLong_AsSsize_t(PyTuple_GET_ITEM(lengths, 3 * i + kind));
            outcome = expected == -1 && PyErr_Occurred()
                          ? -1
                          : look_at_store(vars, kind, own_dict, expected, keys, ids, dicts,
                                          3 * i + kind, held, &at);
        }
        Py_DECREF(vars);
    }
    if (outcome == 1 && at == count) {
        PyObject *picked[4] = {pick(dicts, args[4]), pick(dicts, args[5]), pick(held, args[6]),
                               pick(held, args[7])};
        if (picked[0] && picked[1] && picked[2] && picked[3])
            found = PyTuple_Pack(5, owners, picked[0], picked[1], picked[2], picked[3]);
        for (int i = 0; i < 4; i++)
            Py_XDECREF(picked[i]);
    } else if (outcome >= 0)
        found = Py_NewRef(Py_None);
    Py_XDECREF(owners);
    Py_XDECREF(dicts);
    Py_XDECREF(held);
    return outcome == -2 ? look_in_python(args, nargs) : found;
}

/* Write each value to its store. Return 0, or -1 with an error. */
static int
write_all(PyObject *into, PyObject *keys, PyObject *values)
{
    for (Py_ssize_t i = 0; i < length(into); i++) {
        PyObject *store = item(into, i), *key = item(keys, i), *value = item(values, i);
        if (!store || !key || !value)
            return -1;
        if ((PyDict_CheckExact(store) ? PyDict_SetItem(store, key, value)
                                      : PyObject_SetItem(store, key, value)) < 0)
            return -1;
    }
    return 0;
}

static PyObject *
put_in(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 3 && is_sequence(args[0]) && is_sequence(args[1]) && is_sequence(args[2]),
                "put_in(stores, keys, values)"))
        return NULL;
    return write_all(args[0], args[1], args[2]) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
put_back(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int are_sequences = nargs == 9;
    for (int i = 0; are_sequences && i < 9; i++)
        are_sequences = is_sequence(args[i]);
    if (!expect(are_sequences && PyList_Check(args[4]) && length(args[5]) == length(args[6]) &&
                    length(args[7]) == length(args[8]),
                "put_back(stores, keys, originals, given, taken, dicts, lengths, order, places)"))
        return NULL;
    PyObject *given = args[3], *taken = args[4], *dicts = args[5], *lengths = args[6];
    PyObject *order = args[7], *places = args[8], *key, *value;
    Py_ssize_t count = length(order), at = 0;
    for (Py_ssize_t i = 0; i < length(dicts); i++) {
        PyObject *store = item(dicts, i);
        Py_ssize_t expected = PyLong_AsSsize_t(item(lengths, i));
        if (expected == -1 && PyErr_Occurred())
            return NULL;
        if (!PyDict_CheckExact(store) || PyDict_GET_SIZE(store) != expected ||
            at + expected > count)
            return Py_NewRef(Py_False);
        for (Py_ssize_t position = 0; PyDict_Next(store, &position, &key, &value); at++) {
            Py_ssize_t place = PyLong_AsSsize_t(item(places, at));
            if (!same_key(key, item(order, at)) || (place >= 0 && value != item(given, place))) {
                PyErr_Clear();
                return Py_NewRef(Py_False);
            }
        }
    }
    /* First, so that who is interrupted after this call knows that it was made. */
    if (PyList_SetSlice(taken, 0, PyList_Size(taken), given) < 0)
        return NULL;
    return write_all(args[0], args[1], args[2]) < 0 ? NULL : Py_NewRef(Py_True);
}

static PyObject *
are_in(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 3 && is_sequence(args[0]) && is_sequence(args[1]) && is_sequence(args[2]),
                "are_in(stores, keys, values)"))
        return NULL;
    Py_ssize_t count = length(args[0]);
    if (length(args[2]) != count)
        return Py_NewRef(Py_False);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *store = item(args[0], i), *key = item(args[1], i), *value = item(args[2], i);
        if (!store || !key || !value)
            return NULL;
        if (!PyDict_CheckExact(store) || PyDict_GetItemWithError(store, key) != value)
            return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    }
    return Py_NewRef(Py_True);
}

static PyObject *
are_plain(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 3 && is_sequence(args[0]) && PyTuple_Check(args[1]),
                "are_plain(things, kinds, flag)"))
        return NULL;
    PyObject *things = args[0], *kinds = args[1], *flag = args[2];
    descrgetfunc get = (descrgetfunc)PyType_GetSlot(Py_TYPE(flag), Py_tp_descr_get);
    if (!expect(get != NULL, "are_plain() takes a flag as classes have it"))
        return NULL;
    Py_ssize_t count = length(things), kind_count = PyTuple_Size(kinds);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *thing = item(things, i), *kind = (PyObject *)Py_TYPE(thing);
        Py_ssize_t j = 0;
        while (j < kind_count && PyTuple_GET_ITEM(kinds, j) != kind)
            j++;
        if (j == kind_count)
            return Py_NewRef(Py_False);
        PyObject *value = get(flag, thing, kind);
        if (value == NULL)
            return NULL;
        Py_DECREF(value); /* True or False, which stay */
        if (value != Py_False)
            return Py_NewRef(Py_False);
    }
    return Py_NewRef(Py_True);
}

static PyObject *
having(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 2 && is_sequence(args[0]) && is_sequence(args[1]),
                "having(owners, names)"))
        return NULL;
    PyObject *found = PyList_New(0);
    for (Py_ssize_t i = 0; found != NULL && i < length(args[0]); i++) {
        PyObject *owner = item(args[0], i), *own = PyObject_GenericGetDict(owner, NULL);
        int has = expect(own != NULL, "having() takes what has attributes") - 1;
        for (Py_ssize_t j = 0; has == 0 && j < length(args[1]); j++)
            has = PyDict_Contains(own, item(args[1], j));
        if (has < 0 || (has && PyList_Append(found, owner) < 0))
            Py_CLEAR(found);
        Py_XDECREF(own);
    }
    return found;
}

#define FUNCTION(name, doc) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, doc}

static PyMethodDef functions[] = {
    FUNCTION(look, "fcall.passes.look_in_python, in C."),
    FUNCTION(put_in, "fcall.passes.put_in_in_python, in C."),
    FUNCTION(put_back, "fcall.passes.put_back_in_python, in C."),
    FUNCTION(are_in, "fcall.passes.are_in_in_python, in C."),
    FUNCTION(are_plain, "fcall.passes.are_plain_in_python, in C."),
    FUNCTION(having, "fcall.passes.having_in_python, in C."),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fcall._passes", "The functions of fcall.passes, in C.", -1, functions,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__passes(void)
{
    const char *names[3] = {"_parameters", "_buffers", "_modules"};
    for (int i = 0; i < 3; i++)
        if (stores[i] == NULL && (stores[i] = PyUnicode_InternFromString(names[i])) == NULL)
            return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "REVISION", REVISION) < 0)
        Py_CLEAR(module);
    return module;
}
