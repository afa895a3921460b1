//! Assembles the few instructions of eBPF (RFC 9669) that a filter needs. Pure.

/// A register. r1 to r5 are arguments and lost over a call, r0 is the result, r6 to r9 are kept,
/// r10 points past the end of the stack.
#[derive(Clone, Copy)]
pub struct R(pub u8);

/// Width of a memory access.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Width {
    /// 32 bits.
    W = 0x00,
    /// 16 bits.
    H = 0x08,
    /// 8 bits.
    B = 0x10,
    /// 64 bits.
    D = 0x18,
}

/// When a jump is taken; both sides are unsigned and 32 bits wide unless said otherwise.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum If {
    /// Equal, 64 bits wide (so that null pointers can be told).
    Equal = 0x15,
    /// Not equal, 64 bits wide.
    Unequal = 0x55,
}

/// A place to jump to, forward only.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct Label(usize);

/// A program under construction. Instructions are 8 bytes in the kernel's layout.
#[derive(Default)]
pub struct Assembly {
    code: Vec<[u8; 8]>,
    /// (instruction, its target)
    jumps: Vec<(usize, Label)>,
    /// Where each label is, once placed.
    places: Vec<Option<usize>>,
}

/// A jump goes nowhere, backward, or further than 32767 instructions.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a jump in the filter program has no reachable target")]
pub struct JumpError;

impl Assembly {
    fn put(&mut self, op: u8, dst: R, src: R, offset: i16, imm: i32) {
        let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_le_bytes(), imm.to_le_bytes());
        self.code.push([op, src.0 << 4 | dst.0, o0, o1, i0, i1, i2, i3]);
    }

    /// A new label, to be placed once with [`Self::here`].
    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// Places `label` before the next instruction.
    pub fn here(&mut self, label: Label) {
        let at = self.code.len();
        if let Some(place) = self.places.get_mut(label.0) {
            *place = Some(at);
        }
    }

    /// `dst = imm` (sign-extended).
    pub fn set(&mut self, dst: R, imm: i32) {
        self.put(0xb7, dst, R(0), 0, imm);
    }

    /// `dst = imm`, 64 bits wide; two instructions.
    pub fn set64(&mut self, dst: R, imm: u64) {
        let [a, b, c, d, e, f, g, h] = imm.to_le_bytes();
        self.put(0x18, dst, R(0), 0, i32::from_le_bytes([a, b, c, d]));
        self.put(0, R(0), R(0), 0, i32::from_le_bytes([e, f, g, h]));
    }

    /// `dst = ` the map behind descriptor `fd`; two instructions.
    pub fn map(&mut self, dst: R, fd: i32) {
        const PSEUDO_MAP_FD: R = R(1); // linux/bpf.h, BPF_PSEUDO_MAP_FD
        self.put(0x18, dst, PSEUDO_MAP_FD, 0, fd);
        self.put(0, R(0), R(0), 0, 0);
    }

    /// `dst = src`, 64 bits wide.
    pub fn copy(&mut self, dst: R, src: R) {
        self.put(0xbf, dst, src, 0, 0);
    }

    /// `dst += imm`, 64 bits wide.
    pub fn add(&mut self, dst: R, imm: i32) {
        self.put(0x07, dst, R(0), 0, imm);
    }

    /// `dst -= src`, 64 bits wide.
    pub fn sub(&mut self, dst: R, src: R) {
        self.put(0x1f, dst, src, 0, 0);
    }

    /// `dst &= imm`, 64 bits wide.
    pub fn and(&mut self, dst: R, imm: i32) {
        self.put(0x57, dst, R(0), 0, imm);
    }

    /// `dst >>= imm`, 64 bits wide, unsigned.
    pub fn shift_right(&mut self, dst: R, imm: i32) {
        self.put(0x77, dst, R(0), 0, imm);
    }

    /// `dst` = its lowest 16 bits, which were in network byte order.
    pub fn host_order16(&mut self, dst: R) {
        self.put(0xdc, dst, R(0), 0, 16);
    }

    /// `dst = *(base + offset)`.
    pub fn load(&mut self, width: Width, dst: R, base: R, offset: i16) {
        self.put(0x61 | width as u8, dst, base, offset, 0);
    }

    /// `*(base + offset) = src`.
    pub fn store(&mut self, width: Width, base: R, offset: i16, src: R) {
        self.put(0x63 | width as u8, base, src, offset, 0);
    }

    /// `*(base + offset) = imm`.
    pub fn store_imm(&mut self, width: Width, base: R, offset: i16, imm: i32) {
        self.put(0x62 | width as u8, base, R(0), offset, imm);
    }

    /// `*(base + offset) += src`, atomically, 64 bits wide.
    pub fn atomic_add(&mut self, base: R, offset: i16, src: R) {
        self.put(0xdb, base, src, offset, 0);
    }

    /// Calls a helper of the kernel (linux/bpf.h, `bpf_func_id`).
    pub fn call(&mut self, helper: i32) {
        self.put(0x85, R(0), R(0), 0, helper);
    }

    /// Jumps if `dst` compares so to `imm`.
    pub fn jump_if(&mut self, when: If, dst: R, imm: i32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.put(when as u8, dst, R(0), 0, imm);
    }

    /// Jumps if `dst > src`, 64 bits wide, unsigned.
    pub fn jump_if_above(&mut self, dst: R, src: R, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.put(0x2d, dst, src, 0, 0);
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.put(0x05, R(0), R(0), 0, 0);
    }

    /// Ends the program with the result in r0.
    pub fn exit(&mut self) {
        self.put(0x95, R(0), R(0), 0, 0);
    }

    /// The program's bytes.
    ///
    /// # Errors
    /// [`JumpError`] if a label was not placed after all jumps to it.
    pub fn finish(mut self) -> Result<Vec<[u8; 8]>, JumpError> {
        for (at, label) in self.jumps {
            let target = self.places.get(label.0).copied().flatten().ok_or(JumpError)?;
            let distance = target.checked_sub(at + 1).ok_or(JumpError)?;
            let [low, high] = i16::try_from(distance).map_err(|_| JumpError)?.to_le_bytes();
            if let Some([_, _, o0, o1, ..]) = self.code.get_mut(at) {
                (*o0, *o1) = (low, high);
            }
        }
        Ok(self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_count_from_the_next_instruction() {
        let mut asm = Assembly::default();
        let end = asm.label();
        asm.set(R(0), -1);
        asm.jump_if(If::Equal, R(0), 0, end);
        asm.set64(R(3), 0x1122_3344_5566_7788);
        asm.here(end);
        asm.exit();
        let code = asm.finish().unwrap();
        assert_eq!(code[1], [0x15, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(code[2], [0x18, 3, 0, 0, 0x88, 0x77, 0x66, 0x55]);
        assert_eq!(code[4], [0x95, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_jump_backward_or_nowhere_is_refused() {
        let mut asm = Assembly::default();
        let lost = asm.label();
        asm.jump(lost);
        assert_eq!(asm.finish().unwrap_err(), JumpError);
        let mut asm = Assembly::default();
        let back = asm.label();
        asm.here(back);
        asm.jump(back);
        assert_eq!(asm.finish().unwrap_err(), JumpError);
    }
}
