//! A labelled assembler for the few eBPF instructions the steering program needs.
//!
//! Jumps name a label; [`Assembler::finish`] turns the names into offsets and refuses a program whose
//! labels do not add up, so a typo is an error in a unit test and never a wrong jump in the kernel.

use std::collections::BTreeMap;

/// An eBPF register. R0 is the result, R1 to R5 are arguments lost at a call, R6 to R9 survive calls,
/// R10 is the read-only frame pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// Width of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Size {
    /// Four bytes.
    Word = 0x00,
    /// Two bytes.
    Half = 0x08,
    /// Eight bytes.
    Double = 0x18,
}

/// Condition of a jump; all comparisons are unsigned and 64 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cond {
    /// Equal.
    Eq = 0x10,
    /// Greater than.
    Gt = 0x20,
    /// Greater than or equal.
    Ge = 0x30,
    /// Not equal.
    Ne = 0x50,
    /// Less than.
    Lt = 0xa0,
}

/// Arithmetic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Addition.
    Add = 0x00,
    /// Multiplication.
    Mul = 0x20,
    /// Shift left.
    Shl = 0x60,
    /// Shift right, zeroes come in.
    Shr = 0x70,
    /// Unsigned remainder; a zero divisor leaves the value as it is.
    Mod = 0x90,
    /// Copy.
    Mov = 0xb0,
}

/// One instruction, laid out as the kernel reads it (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    /// Operation code.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub regs: u8,
    /// Jump or memory offset.
    pub off: i16,
    /// Immediate value.
    pub imm: i32,
}

impl Insn {
    /// The eight bytes as they are in memory on this machine.
    #[must_use]
    pub fn bytes(self) -> [u8; 8] {
        let [o0, o1] = self.off.to_ne_bytes();
        let [i0, i1, i2, i3] = self.imm.to_ne_bytes();
        [self.code, self.regs, o0, o1, i0, i1, i2, i3]
    }
}

/// Why a program could not be put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AsmError {
    /// A jump names a label that no instruction carries.
    #[error("label {0:?} is jumped to but never set")]
    UnknownLabel(&'static str),
    /// The same label was set twice.
    #[error("label {0:?} is set twice")]
    DuplicateLabel(&'static str),
    /// A jump is longer than 16 bits can say.
    #[error("the jump to {0:?} is too far")]
    TooFar(&'static str),
}

const CLASS_LDX_MEM: u8 = 0x61;
const CLASS_STX_MEM: u8 = 0x63;
const CLASS_ST_MEM: u8 = 0x62;
const CLASS_JMP: u8 = 0x05;
const CLASS_JMP32: u8 = 0x06;
const CLASS_ALU64: u8 = 0x07;
const SOURCE_REG: u8 = 0x08;
const CALL: u8 = 0x85;

/// Collects instructions and labels. Every method appends one instruction (map loads append two).
#[derive(Debug, Default)]
pub struct Assembler {
    insns: Vec<Insn>,
    labels: BTreeMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
    duplicate: Option<&'static str>,
}

impl Assembler {
    /// An empty program.
    #[must_use]
    pub fn new() -> Assembler {
        Assembler::default()
    }

    fn push(&mut self, code: u8, dst: Reg, src: Reg, off: i16, imm: i32) {
        self.insns.push(Insn { code, regs: dst as u8 | (src as u8) << 4, off, imm });
    }

    /// Names the next instruction.
    pub fn label(&mut self, name: &'static str) {
        if self.labels.insert(name, self.insns.len()).is_some() {
            self.duplicate.get_or_insert(name);
        }
    }

    /// `dst = dst op src`
    pub fn alu(&mut self, op: Op, dst: Reg, src: Reg) {
        self.push(CLASS_ALU64 | SOURCE_REG | op as u8, dst, src, 0, 0);
    }

    /// `dst = dst op imm`
    pub fn alu_imm(&mut self, op: Op, dst: Reg, imm: i32) {
        self.push(CLASS_ALU64 | op as u8, dst, Reg::R0, 0, imm);
    }

    /// `dst = *(size *)(src + off)`
    pub fn load(&mut self, size: Size, dst: Reg, src: Reg, off: i16) {
        self.push(CLASS_LDX_MEM | size as u8, dst, src, off, 0);
    }

    /// `*(size *)(dst + off) = src`
    pub fn store(&mut self, size: Size, dst: Reg, off: i16, src: Reg) {
        self.push(CLASS_STX_MEM | size as u8, dst, src, off, 0);
    }

    /// `*(size *)(dst + off) = imm`
    pub fn store_imm(&mut self, size: Size, dst: Reg, off: i16, imm: i32) {
        self.push(CLASS_ST_MEM | size as u8, dst, Reg::R0, off, imm);
    }

    /// `lock *(u64 *)(dst + off) += src`
    pub fn atomic_add(&mut self, dst: Reg, off: i16, src: Reg) {
        self.push(ATOMIC_ADD, dst, src, off, 0);
    }

    /// Loads the address of the map behind descriptor `fd`.
    pub fn load_map(&mut self, dst: Reg, fd: i32) {
        // Source register 1 (BPF_PSEUDO_MAP_FD) tells the kernel that the immediate is a descriptor.
        self.push(0x18, dst, Reg::R1, 0, fd);
        self.push(0, Reg::R0, Reg::R0, 0, 0);
    }

    /// Calls a kernel helper by number.
    pub fn call(&mut self, helper: i32) {
        self.push(CALL, Reg::R0, Reg::R0, 0, helper);
    }

    /// Index of the next instruction.
    #[must_use]
    pub fn offset(&self) -> u32 {
        u32::try_from(self.insns.len()).unwrap_or(u32::MAX)
    }

    /// Calls the function at `label`: arguments in R1 to R5, result in R0, R6 to R9 are kept.
    pub fn call_function(&mut self, label: &'static str) {
        self.jumps.push((self.insns.len(), label));
        // Source register 1 (BPF_PSEUDO_CALL): a function of this program and not a helper.
        self.push(CALL, Reg::R0, Reg::R1, 0, 0);
    }

    /// Jumps to `label`.
    pub fn jump(&mut self, label: &'static str) {
        self.jumps.push((self.insns.len(), label));
        self.push(CLASS_JMP, Reg::R0, Reg::R0, 0, 0);
    }

    /// `if a cond b goto label`
    pub fn jump_if(&mut self, cond: Cond, a: Reg, b: Reg, label: &'static str) {
        self.jumps.push((self.insns.len(), label));
        self.push(CLASS_JMP | SOURCE_REG | cond as u8, a, b, 0, 0);
    }

    /// `if a cond imm goto label`
    pub fn jump_if_imm(&mut self, cond: Cond, a: Reg, imm: i32, label: &'static str) {
        self.jumps.push((self.insns.len(), label));
        self.push(CLASS_JMP | cond as u8, a, Reg::R0, 0, imm);
    }

    /// Unless the lower 32 bits of `a` are `word`, skips the next `insns` instructions.
    pub fn skip_unless_word(&mut self, a: Reg, word: u32, insns: i16) {
        self.push(CLASS_JMP32 | Cond::Ne as u8, a, Reg::R0, insns, word.cast_signed());
    }

    /// Returns R0 to the kernel.
    pub fn exit(&mut self) {
        self.push(0x95, Reg::R0, Reg::R0, 0, 0);
    }

    /// Resolves the labels.
    ///
    /// # Errors
    /// When a label is missing, set twice, or out of reach.
    pub fn finish(mut self) -> Result<Vec<Insn>, AsmError> {
        if let Some(name) = self.duplicate {
            return Err(AsmError::DuplicateLabel(name));
        }
        for (at, name) in self.jumps {
            let target = *self.labels.get(name).ok_or(AsmError::UnknownLabel(name))?;
            let distance = i64::try_from(target).unwrap_or(i64::MAX) - i64::try_from(at).unwrap_or(0) - 1;
            let distance = i16::try_from(distance).map_err(|_| AsmError::TooFar(name))?;
            match &mut self.insns[at] {
                call if call.code == CALL => call.imm = distance.into(),
                jump => jump.off = distance,
            }
        }
        Ok(self.insns)
    }
}

/// Operation code of the 64-bit atomic add.
pub const ATOMIC_ADD: u8 = 0xdb;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_reach_their_labels_both_ways() {
        let mut asm = Assembler::new();
        asm.label("top");
        asm.jump_if_imm(Cond::Eq, Reg::R1, 7, "end");
        asm.jump("top");
        asm.label("end");
        asm.exit();
        let insns = asm.finish().unwrap();
        assert_eq!((insns[0].off, insns[1].off), (1, -2));
        assert_eq!(insns[0].bytes(), [0x15, 1, 1, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn a_call_carries_its_distance_in_the_immediate() {
        let mut asm = Assembler::new();
        asm.call_function("callee");
        asm.exit();
        assert_eq!(asm.offset(), 2);
        asm.label("callee");
        asm.exit();
        let call = asm.finish().unwrap()[0];
        assert_eq!((call.regs, call.off, call.imm), (0x10, 0, 1));
    }

    #[test]
    #[cfg_attr(miri, ignore = "long, and without unsafe")]
    fn labels_must_add_up() {
        let mut asm = Assembler::new();
        asm.jump("nowhere");
        assert_eq!(asm.finish(), Err(AsmError::UnknownLabel("nowhere")));
        let mut asm = Assembler::new();
        asm.label("twice");
        asm.label("twice");
        assert_eq!(asm.finish(), Err(AsmError::DuplicateLabel("twice")));
        let mut asm = Assembler::new();
        asm.jump("far");
        for _ in 0..40_000 {
            asm.exit();
        }
        asm.label("far");
        assert_eq!(asm.finish(), Err(AsmError::TooFar("far")));
    }
}
