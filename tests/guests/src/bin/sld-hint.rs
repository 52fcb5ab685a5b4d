//! What the hypervisor says of split locks, CPUID leaf 0x4000_0001: prints `hint EAX EBX`.
//!
//! Exit codes: success; 0x30 to 0x33, see the constants. Another hypervisor, or none: success.

#![no_std]
#![no_main]

use guests::cpu::{cpuid, cpuid_count, offers_split_lock_detection};
use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const HIGHEST: Failure = Failure::new(0x30, "leaf 0x40000000 does not name leaf 0x40000001");
const RESERVED: Failure = Failure::new(0x31, "a reserved bit is 1");
const OFFERED: Failure = Failure::new(0x32, "CPUID leaf 7 says otherwise");
const SUBLEAF: Failure = Failure::new(0x33, "the answer depends on ECX");

fn main(_: &Boot) -> Result<(), Failure> {
    let signature = cpuid(0x4000_0000);
    let name = [signature.ebx, signature.ecx, signature.edx];
    if name.map(u32::to_le_bytes) != [*b"Unsp", *b"litH", *b"V\0\0\0"] {
        println!("another hypervisor");
        return Ok(());
    }
    HIGHEST.unless(signature.eax == 0x4000_0001)?;
    let hint = cpuid(0x4000_0001);
    println!("hint {:#x} {:#x}", hint.eax, hint.ebx);
    RESERVED.unless(hint.eax & !0xFF3 == 0 && hint.ecx == 0 && hint.edx == 0)?;
    OFFERED.unless(offers_split_lock_detection() == Ok(hint.eax & 1 != 0))?;
    let other = cpuid_count(0x4000_0001, 5);
    SUBLEAF.unless((other.eax, other.ebx) == (hint.eax, hint.ebx))?;
    let behind = cpuid(0x4000_0002);
    RESERVED.unless([behind.eax, behind.ebx, behind.ecx, behind.edx] == [0; 4])
}
