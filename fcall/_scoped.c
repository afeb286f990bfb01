/* The base class of ScopedDict, in C. scoped/dicts.py says what it is for: there it is in Python.

   All of this is done to each of a module's dicts in each call while others may look, or when an
   entry is read. Anything else is left to Python.
*/

#include "_sequences.h"

#include <stddef.h>
#include <structmember.h>

typedef struct {
    PyDictObject dict;
    PyObject *own, *scopes;
    PyObject *number; /* its id, once it was asked for: the key of its layers */
} Scoped;

/* Set by scoped_base(): the context variable of the scopes of whoever asks; ABSENT. */
static PyObject *open_scopes, *absent;

/* A borrowed reference to its id. */
static inline PyObject *
number_of(Scoped *self)
{
    if (self->number == NULL)
        self->number = PyLong_FromVoidPtr(self);
    return self->number;
}

/* A new reference to what a dict has under a key; NULL, perhaps with an error, for nothing. */
static inline PyObject *
entry_of(PyObject *entries, PyObject *key)
{
    Py_INCREF(entries); /* to compare keys may run code of anybody */
    PyObject *value = Py_XNewRef(PyDict_GetItemWithError(entries, key));
    Py_DECREF(entries);
    return value;
}

/* A new reference to what whoever asks sees under a key, perhaps ABSENT; NULL with an error. */
static PyObject *
seen(Scoped *self, PyObject *key)
{
    PyObject *scopes, *value = NULL, *number = number_of(self);
    if (number == NULL || PyContextVar_Get(open_scopes, NULL, &scopes) < 0)
        return NULL;
    Py_ssize_t i = scopes != NULL && PyTuple_CheckExact(scopes) ? PyTuple_GET_SIZE(scopes) : 0;
    while (value == NULL && --i >= 0) {
        PyObject *scope = PyTuple_GET_ITEM(scopes, i), *layer = NULL;
        if (PyDict_Check(scope) && PyDict_GET_SIZE(scope) > 0)
            layer = PyDict_GetItemWithError(scope, number);
        if (layer != NULL && PyDict_Check(layer))
            value = entry_of(layer, key);
        if (value == NULL && PyErr_Occurred())
            break;
    }
    Py_XDECREF(scopes);
    if (value != NULL || PyErr_Occurred())
        return value;
    if (self->own == NULL) {
        PyErr_SetString(PyExc_AttributeError, "own");
        return NULL;
    }
    if (!PyDict_CheckExact(self->own))
        return PyObject_CallMethod(self->own, "get", "OO", key, absent);
    value = entry_of(self->own, key);
    return value != NULL || PyErr_Occurred() ? value : Py_NewRef(absent);
}

static PyObject *
subscript(PyObject *self, PyObject *key)
{
    PyObject *value = seen((Scoped *)self, key);
    if (value != NULL && value == absent) {
        Py_CLEAR(value);
        PyErr_SetObject(PyExc_KeyError, key);
    }
    return value;
}

static int
contains(PyObject *self, PyObject *key)
{
    PyObject *value = seen((Scoped *)self, key);
    Py_XDECREF(value);
    return value == NULL ? -1 : value != absent;
}

static PyObject *
read_entry(PyObject *self, PyObject *key)
{
    return seen((Scoped *)self, key);
}

/* A new scoped dict over a plain one. */
static PyObject *
over(PyTypeObject *cls, PyObject *own, PyObject *scopes)
{
    PyObject *nothing = PyTuple_New(0);
    Scoped *self = nothing ? (Scoped *)PyDict_Type.tp_new(cls, nothing, NULL) : NULL;
    Py_XDECREF(nothing);
    if (self == NULL)
        return NULL;
    self->own = Py_NewRef(own);
    self->scopes = Py_NewRef(scopes);
    if (number_of(self) == NULL || PyDict_Update((PyObject *)self, own) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

/* Add a place, (home, name, scoped dict), and a layer for the dict that stands under a name in what
   an owner has. Return 1; 0 if no plain dict stands there; -1 with an error. */
static int
prepare(PyTypeObject *cls, PyObject *owners, PyObject *group, PyObject *scopes, PyObject *places,
        PyObject *layers)
{
    if (!expect(PyTuple_Check(group) && PyTuple_GET_SIZE(group) == 2,
                "install() takes pairs of a number and a name"))
        return -1;
    PyObject *name = PyTuple_GET_ITEM(group, 1);
    Py_ssize_t number = PyLong_AsSsize_t(PyTuple_GET_ITEM(group, 0));
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < 0 || number >= Py_SIZE(owners)) {
        PyErr_SetString(PyExc_IndexError, "install() was given no such owner");
        return -1;
    }
    PyObject *owner = PySequence_Fast_GET_ITEM(owners, number);
    PyObject *home = PyObject_GenericGetDict(owner, NULL), *own;
    if (home == NULL || !PyDict_CheckExact(home)) {
        PyErr_Clear();
        Py_XDECREF(home);
        return 0;
    }
    own = PyDict_GetItemWithError(home, name);
    if (own == NULL || !PyDict_CheckExact(own)) {
        Py_DECREF(home);
        return PyErr_Occurred() ? -1 : 0;
    }
    Py_INCREF(own); /* a finalizer may replace it meanwhile */
    PyObject *scoped = over(cls, own, scopes), *layer = PyDict_New();
    PyObject *place = scoped ? PyTuple_Pack(3, home, name, scoped) : NULL;
    int done = place && layer && PyList_Append(places, place) == 0 &&
               PyList_Append(layers, layer) == 0;
    Py_DECREF(own);
    Py_DECREF(home);
    Py_XDECREF(scoped);
    Py_XDECREF(layer);
    Py_XDECREF(place);
    return done ? 1 : -1;
}

/* Put the scoped dicts of places into these. Return 0, or -1 with an error. */
static int
commit(PyObject *places, PyObject *layers, PyObject *scope, PyObject *installed)
{
    Py_ssize_t end = PyList_GET_SIZE(installed);
    /* First, so that who is interrupted after this call, or gets an error, can undo it. */
    if (PyList_SetSlice(installed, end, end, places) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(places); i++) {
        PyObject *place = PyList_GET_ITEM(places, i), *scoped = PyTuple_GET_ITEM(place, 2);
        if (PyDict_SetItem(scope, number_of((Scoped *)scoped), PyList_GET_ITEM(layers, i)) < 0 ||
            PyDict_SetItem(PyTuple_GET_ITEM(place, 0), PyTuple_GET_ITEM(place, 1), scoped) < 0)
            return -1;
    }
    return 0;
}

static PyObject *
install(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 6 && is_sequence(args[0]) && is_sequence(args[1]) &&
                    is_sequence(args[2]) && PyTuple_Check(args[3]) && PyDict_Check(args[4]) &&
                    PyList_Check(args[5]),
                "install(owners, groups, group_of_each, scopes, scope, installed)"))
        return NULL;
    PyObject *groups = args[1], *places = PyList_New(0), *layers = PyList_New(0), *picked = NULL;
    int outcome = places && layers ? 1 : -1;
    for (Py_ssize_t i = 0; outcome == 1 && i < Py_SIZE(groups); i++)
        outcome = prepare((PyTypeObject *)cls, args[0], PySequence_Fast_GET_ITEM(groups, i),
                          args[3], places, layers);
    if (outcome == 0)
        picked = Py_NewRef(Py_None);
    else if (outcome == 1 && (picked = pick(layers, args[2])) != NULL &&
             commit(places, layers, args[4], args[5]) < 0)
        Py_CLEAR(picked);
    Py_XDECREF(places);
    Py_XDECREF(layers);
    return picked;
}

static PyObject *
uninstall(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 2 && PyList_Check(args[0]), "uninstall(installed, scopes)"))
        return NULL;
    PyObject *installed = args[0];
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(installed); i++) {
        PyObject *place = PyList_GET_ITEM(installed, i), *home, *scoped;
        if (!expect(PyTuple_Check(place) && PyTuple_GET_SIZE(place) == 3 &&
                        PyDict_Check(home = PyTuple_GET_ITEM(place, 0)) &&
                        PyObject_TypeCheck(scoped = PyTuple_GET_ITEM(place, 2),
                                           (PyTypeObject *)cls),
                    "uninstall() takes what install() noted"))
            return NULL;
        if (((Scoped *)scoped)->scopes != args[1] || ((Scoped *)scoped)->own == NULL ||
            PyDict_GetItemWithError(home, PyTuple_GET_ITEM(place, 1)) != scoped)
            return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(installed); i++) {
        PyObject *place = PyList_GET_ITEM(installed, i);
        Scoped *scoped = (Scoped *)PyTuple_GET_ITEM(place, 2); /* which the place keeps alive */
        if (PyDict_SetItem(PyTuple_GET_ITEM(place, 0), PyTuple_GET_ITEM(place, 1), scoped->own) < 0)
            return NULL;
    }
    return Py_NewRef(Py_True);
}

static int
traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Scoped *)self)->own);
    Py_VISIT(((Scoped *)self)->scopes);
    return PyDict_Type.tp_traverse(self, visit, arg);
}

static int
clear(PyObject *self)
{
    Py_CLEAR(((Scoped *)self)->own);
    Py_CLEAR(((Scoped *)self)->scopes);
    return PyDict_Type.tp_clear(self);
}

static void
dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(((Scoped *)self)->own);
    Py_CLEAR(((Scoped *)self)->scopes);
    Py_CLEAR(((Scoped *)self)->number);
    PyDict_Type.tp_dealloc(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"own", T_OBJECT_EX, offsetof(Scoped, own), 0, "The module's own dict."},
    {"scopes", T_OBJECT_EX, offsetof(Scoped, scopes), 0, "The ids of the open scopes over it."},
    {NULL, 0, 0, 0, NULL},
};

#define METHOD(name, function, flags, doc)                                                         \
    {name, (PyCFunction)(void (*)(void))function, flags, doc}

static PyMethodDef methods[] = {
    METHOD("_read", read_entry, METH_O, "Return what whoever asks sees, ABSENT for nothing."),
    METHOD("install", install, METH_FASTCALL | METH_CLASS, "Put a dict over each of several."),
    METHOD("uninstall", uninstall, METH_FASTCALL | METH_CLASS, "Undo install()."),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_mp_subscript, subscript}, {Py_sq_contains, contains}, {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},         {Py_tp_dealloc, dealloc},   {Py_tp_members, members},
    {Py_tp_methods, methods},     {0, NULL},
};

static PyType_Spec spec = {
    "fcall._scoped.Base", sizeof(Scoped), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots,
};

static PyObject *
scoped_base(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (!expect(nargs == 2 && PyContextVar_CheckExact(args[0]), "scoped_base(open_scopes, absent)"))
        return NULL;
    PyObject *before[2] = {open_scopes, absent};
    open_scopes = Py_NewRef(args[0]);
    absent = Py_NewRef(args[1]);
    Py_XDECREF(before[0]);
    Py_XDECREF(before[1]);
    return PyType_FromSpecWithBases(&spec, (PyObject *)&PyDict_Type);
}

static PyMethodDef functions[] = {
    METHOD("scoped_base", scoped_base, METH_FASTCALL, "The base class of ScopedDict, in C."),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fcall._scoped", "The base class of fcall.scoped.ScopedDict, in C.", -1,
    functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__scoped(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "REVISION", REVISION) < 0)
        Py_CLEAR(module);
    return module;
}
