//! What instruction bytes say: the guest's (does it lock?) and Bochs' own (is this stub empty?).

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

/// Length of the absolute jump `jmp [rip+0]; .quad target` that replaces a stub.
pub const JUMP_LEN: usize = 14;

/// `endbr64`, with which compilers for CET start every function.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const RET: u8 = 0xc3;

/// Width of the locked access that the instruction in `code` makes, in bytes, or `None` if it makes
/// none: LOCK prefix with a memory destination, or XCHG with memory, which locks by itself (SDM
/// Volume 3, "LOCK# Signal and Bus Locking").
///
/// `bits` is the code size (16, 32 or 64).
///
/// # Errors
/// If `code` is not exactly one valid instruction: then it is not what Bochs is executing.
pub fn locked_access_width(code: &[u8], bits: u32) -> Result<Option<u32>, String> {
    let mut decoder = Decoder::new(bits, code, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.code() == Code::INVALID || instruction.len() != code.len() {
        return Err(format!("{code:02x?} is not one {bits}-bit instruction"));
    }
    let locks = instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg;
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    Ok((locks && memory).then(|| instruction.memory_size().size() as u32))
}

/// Whether `stub` (its first 16 bytes or more) is an empty function that [`JUMP_LEN`] bytes may
/// overwrite: `ret` or `endbr64; ret`, and only padding behind it.
pub fn is_empty_stub(stub: &[u8]) -> bool {
    let body = stub.strip_prefix(&ENDBR64).unwrap_or(stub);
    let Some((&RET, padding)) = body.split_first() else {
        return false;
    };
    let mut start = stub.len() - padding.len();
    let mut decoder = Decoder::new(64, padding, DecoderOptions::NONE);
    while start < JUMP_LEN && decoder.can_decode() {
        let instruction = decoder.decode();
        if !matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3) {
            return false;
        }
        start += instruction.len();
    }
    start >= JUMP_LEN
}

/// The jump that replaces a stub.
pub fn jump_to(target: usize) -> [u8; JUMP_LEN] {
    let mut jump = [0xff, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    jump[6..].copy_from_slice(&target.to_le_bytes());
    jump
}

/// Where in the object that `this` points to a function finds the one argument that it passes on:
/// `code`, which stands at address `at`, must load RSI from RDI plus a constant and then call or jump
/// to `callee`. Returns the constant.
pub fn forwarded_field(code: &[u8], at: u64, callee: u64) -> Option<u64> {
    let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    let mut field = None;
    while decoder.can_decode() {
        let instruction = decoder.decode();
        if loads_field(&instruction) {
            field = Some(instruction.memory_displacement64());
        }
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::Call | FlowControl::UnconditionalBranch => {
                return field.filter(|_| instruction.near_branch_target() == callee);
            }
            _ => return None,
        }
    }
    None
}

/// `mov rsi, [rdi + constant]`
fn loads_field(instruction: &Instruction) -> bool {
    instruction.code() == Code::Mov_r64_rm64
        && instruction.op0_register() == Register::RSI
        && instruction.op1_kind() == OpKind::Memory
        && instruction.memory_base() == Register::RDI
        && instruction.memory_index() == Register::None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_read_modify_writes_are_recognised_with_their_width() {
        let cases: [(&[u8], u32, Option<u32>); 12] = [
            (&[0xf0, 0x83, 0x00, 0x01], 64, Some(4)), // lock add dword [rax], 1
            (&[0xf0, 0x66, 0x83, 0x00, 0x01], 64, Some(2)), // the same on a word
            (&[0xf0, 0x48, 0xff, 0x00], 64, Some(8)), // lock inc qword [rax]
            (&[0xf0, 0x0f, 0xc7, 0x08], 64, Some(8)), // lock cmpxchg8b [rax]
            (&[0x87, 0x03], 64, Some(4)),             // xchg [rbx], eax: locks by itself
            (&[0x87, 0x07], 16, Some(2)),             // the same in 16-bit code: xchg [bx], ax
            (&[0x86, 0x03], 32, Some(1)),             // xchg byte
            (&[0x87, 0xc3], 64, None),                // xchg ebx, eax: no memory
            (&[0x90], 64, None),                      // nop, an xchg of old
            (&[0x83, 0x00, 0x01], 64, None),          // add dword [rax], 1 without a lock
            (&[0x81, 0x00, 0xf0, 0xf0, 0xf0, 0xf0], 64, None), // 0xf0 as an immediate
            (&[0xf0, 0x0f, 0xba, 0x28, 0x05], 32, Some(4)), // lock bts dword [eax], 5
        ];
        for (code, bits, width) in cases {
            assert_eq!(locked_access_width(code, bits), Ok(width), "{code:02x?} in {bits} bits");
        }
    }

    #[test]
    fn bytes_that_are_not_one_instruction_are_an_error() {
        assert!(locked_access_width(&[0x90, 0x90], 64).is_err());
        assert!(locked_access_width(&[0xf0], 64).is_err());
        assert!(locked_access_width(&[], 64).is_err());
        // LOCK on a register destination is #UD.
        assert!(locked_access_width(&[0xf0, 0x01, 0xc0], 64).is_err());
    }

    #[test]
    fn only_empty_stubs_may_be_overwritten() {
        let nops = [0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00];
        let stub = |code: &[&[u8]]| code.concat();
        assert!(is_empty_stub(&stub(&[&ENDBR64, &[RET], &nops])));
        assert!(is_empty_stub(&stub(&[&[RET], &nops, &[0x90; 4]])));
        assert!(is_empty_stub(&stub(&[&[RET], &[0xcc; 15]])));
        // It does something: xor eax, eax; ret.
        assert!(!is_empty_stub(&stub(&[&[0x31, 0xc0, RET], &[0x90; 13]])));
        // The next function starts within the jump.
        assert!(!is_empty_stub(&stub(&[&[RET], &[0x90; 7], &ENDBR64, &[RET; 4]])));
        assert!(!is_empty_stub(&[RET, 0x90]));
        assert!(!is_empty_stub(&[]));
    }

    #[test]
    fn the_jump_is_absolute() {
        assert_eq!(
            jump_to(0x1122_3344_5566_7788),
            [0xff, 0x25, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
        );
    }

    #[test]
    fn a_forwarded_field_is_found_only_before_the_expected_callee() {
        // endbr64; mov rsi, [rdi+0x120]; jmp +0x10
        let code = [
            0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0x8b, 0xb7, 0x20, 0x01, 0x00, 0x00, 0xe9, 0x10, 0x00,
            0x00, 0x00,
        ];
        assert_eq!(forwarded_field(&code, 0x1000, 0x1020), Some(0x120));
        assert_eq!(forwarded_field(&code, 0x1000, 0x1021), None);
        // push rbp; mov rbp, rsp; mov rsi, [rdi+8]; call +0
        let framed = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x8b, 0x77, 0x08, 0xe8, 0x00, 0x00, 0x00, 0x00];
        assert_eq!(forwarded_field(&framed, 0x1000, 0x100d), Some(8));
        // It returns without calling anything.
        assert_eq!(forwarded_field(&[0x48, 0x8b, 0x77, 0x08, RET], 0x1000, 0x1005), None);
    }
}
