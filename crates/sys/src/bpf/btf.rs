//! Type information (BTF) for the functions of a program.
//!
//! The verifier checks a function with type information once, for any arguments, instead of once per call. That is
//! what makes trying a thousand keys cheap to verify. The format: a header, type records, then their names.

/// A function of a program: result `int`, arguments the context and then some `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Name, a C identifier.
    pub name: &'static str,
    /// Index of its first instruction.
    pub offset: u32,
    /// Number of `u32` arguments after the context.
    pub numbers: u32,
}

const MAGIC_AND_VERSION: u32 = 0x0001_eb9f;
const HEADER_BYTES: u32 = 24;
const KIND_INT: u32 = 1 << 24;
const KIND_PTR: u32 = 2 << 24;
const KIND_STRUCT: u32 = 4 << 24;
const KIND_FUNC: u32 = 12 << 24;
const KIND_FUNC_PROTO: u32 = 13 << 24;
const FUNC_GLOBAL: u32 = 1;

// Numbers of the types, in the order they are written.
const INT: u32 = 1;
const CONTEXT: u32 = 2;
const CONTEXT_POINTER: u32 = 3;
const FIRST_FREE: u32 = 4;

/// The blob for BPF_BTF_LOAD, and per function its `bpf_func_info`: offset and type number.
#[must_use]
pub fn describe(functions: &[Function]) -> (Vec<u8>, Vec<[u32; 2]>) {
    // The first name is the empty one.
    let mut names = vec![0];
    let mut name = |text: &str| {
        let at = u32::try_from(names.len()).unwrap_or(u32::MAX);
        names.extend(text.bytes().chain([0]));
        at
    };
    let mut types = vec![name("int"), KIND_INT, 4, 32];
    // The verifier knows the context by the name of its type.
    types.extend([name("sk_reuseport_md"), KIND_STRUCT, 0]);
    types.extend([0, KIND_PTR, CONTEXT]);
    let mut infos = Vec::new();
    for (prototype, function) in (FIRST_FREE..).step_by(2).zip(functions) {
        types.extend([0, KIND_FUNC_PROTO | (1 + function.numbers), INT]);
        types.extend([name("ctx"), CONTEXT_POINTER]);
        for _ in 0..function.numbers {
            types.extend([name("number"), INT]);
        }
        types.extend([name(function.name), KIND_FUNC | FUNC_GLOBAL, prototype]);
        infos.push([function.offset, prototype + 1]);
    }
    let type_bytes = u32::try_from(types.len() * 4).unwrap_or(u32::MAX);
    let name_bytes = u32::try_from(names.len()).unwrap_or(u32::MAX);
    let header = [MAGIC_AND_VERSION, HEADER_BYTES, 0, type_bytes, type_bytes, name_bytes];
    let words = header.into_iter().chain(types).flat_map(u32::to_ne_bytes);
    (words.chain(names).collect(), infos)
}
