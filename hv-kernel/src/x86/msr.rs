//! MSR access that survives #GP.
//!
//! 0x33 and 0xcf do not exist everywhere, and a hypervisor underneath may hide what the model has.
//! Each access leaves an entry in `.ex_table`: where it may fault, and where to go on then. The
//! #GP handler ([`super::exceptions`]) looks the address up, as Linux does with its `__ex_table`.

use core::arch::asm;

use sld::{MsrFault, TestCtrl};

/// One entry of `.ex_table`: distances from the fields themselves.
#[repr(C)]
pub struct ExceptionTableEntry {
    fault: i32,
    resume: i32,
}

const _: () = assert!(size_of::<ExceptionTableEntry>() == 8);

unsafe extern "C" {
    static __ex_table_start: [ExceptionTableEntry; 0];
    static __ex_table_end: [ExceptionTableEntry; 0];
}

/// Where to go on after a fault at `rip`; `None` if a fault there is not expected.
pub fn resume_address(rip: u64) -> Option<u64> {
    let start = &raw const __ex_table_start as *const ExceptionTableEntry;
    let end = &raw const __ex_table_end as *const ExceptionTableEntry;
    let count = (end as usize - start as usize) / size_of::<ExceptionTableEntry>();
    (0..count).find_map(|index| {
        // SAFETY: the linker script puts whole entries between the two symbols.
        let entry = unsafe { &*start.add(index) };
        let absolute =
            |field: &i32| (&raw const *field as u64).wrapping_add_signed((*field).into());
        (absolute(&entry.fault) == rip).then(|| absolute(&entry.resume))
    })
}

macro_rules! may_fault {
    ($instruction:literal) => {
        concat!(
            "mov {fault:e}, 1\n",
            "2: ",
            $instruction,
            "\n",
            "xor {fault:e}, {fault:e}\n",
            "3:\n",
            ".pushsection .ex_table, \"a\"\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - .\n",
            ".popsection"
        )
    };
}

/// RDMSR.
///
/// # Errors
///
/// It raised #GP.
///
/// # Safety
///
/// Reading the MSR has no side effect that matters, whether or not it exists.
pub unsafe fn read(number: u32) -> Result<u64, MsrFault> {
    let (low, high, fault): (u32, u32, u32);
    // SAFETY: the caller's obligation; a fault is resumed at label 3 with `fault` still 1.
    unsafe {
        asm!(may_fault!("rdmsr"), in("ecx") number, inout("eax") 0 => low, inout("edx") 0 => high,
             fault = out(reg) fault, options(nostack));
    }
    if fault == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(MsrFault) }
}

/// WRMSR.
///
/// # Errors
///
/// It raised #GP; the MSR is unchanged.
///
/// # Safety
///
/// The CPU may be told this.
pub unsafe fn write(number: u32, value: u64) -> Result<(), MsrFault> {
    let fault: u32;
    // SAFETY: as for `read`.
    unsafe {
        asm!(may_fault!("wrmsr"), in("ecx") number, in("eax") value as u32,
             in("edx") (value >> 32) as u32, fault = out(reg) fault, options(nostack));
    }
    if fault == 0 { Ok(()) } else { Err(MsrFault) }
}

/// The CPU's split-lock detection, as the `sld` crate uses it.
pub struct TestCtrlMsr;

impl TestCtrl for TestCtrlMsr {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let answer = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        // SAFETY: reading it has no side effect.
        unsafe { read(sld::MSR_CORE_CAPABILITIES) }
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        // SAFETY: `sld` asks on CPUs only that are known to have it.
        unsafe { read(sld::MSR_TEST_CTRL) }
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        // SAFETY: `sld` writes on CPUs only that are known to have it, and changes bit 29 only.
        unsafe { write(sld::MSR_TEST_CTRL, value) }
    }
}
