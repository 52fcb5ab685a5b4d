//! What befalls a machine besides split locks: what the firmware leaves in it, and hardware that fails.

/// A write to an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrWrite {
    /// On this CPU only.
    pub cpu: Option<u32>,
    /// Its number.
    pub number: u32,
    /// The value.
    pub value: u64,
}

/// What happens once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// An NMI that no CPU has sent.
    Nmi,
    /// `#MC`, after these writes.
    MachineCheck(Vec<MsrWrite>),
}

impl Mishap {
    /// Reads `nmi`, or `mc` and writes, separated by commas.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(',').unwrap_or((text, "")) {
            ("nmi", "") => Some(Self::Nmi),
            ("mc", "") => Some(Self::MachineCheck(Vec::new())),
            ("mc", writes) => parse_writes(writes).map(Self::MachineCheck),
            _ => None,
        }
    }
}

/// Reads writes `number=value` or `cpu:number=value` in hexadecimal, separated by commas.
pub fn parse_writes(text: &str) -> Option<Vec<MsrWrite>> {
    let write = |text: &str| {
        let (place, value) = text.split_once('=')?;
        let hexadecimal = |text| u32::from_str_radix(text, 16).ok();
        let (cpu, number) = match place.split_once(':') {
            Some((cpu, number)) => (Some(hexadecimal(cpu)?), number),
            None => (None, place),
        };
        let value = u64::from_str_radix(value, 16).ok()?;
        Some(MsrWrite { cpu, number: hexadecimal(number)?, value })
    };
    text.split(',').map(write).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read() {
        let write = |number, value| MsrWrite { cpu: None, number, value };
        assert_eq!(parse_writes("3a=1"), Some(vec![write(0x3a, 1)]));
        let second = MsrWrite { cpu: Some(1), ..write(0x3a, 1) };
        assert_eq!(parse_writes("1:3a=1,3a=5"), Some(vec![second, write(0x3a, 5)]));
        let writes = vec![write(0x17a, 7), write(0x405, 0xbd80_0000_0000_0134)];
        assert_eq!(
            Mishap::parse("mc,17a=7,405=bd80000000000134"),
            Some(Mishap::MachineCheck(writes))
        );
        assert_eq!(Mishap::parse("mc"), Some(Mishap::MachineCheck(vec![])));
        assert_eq!(Mishap::parse("nmi"), Some(Mishap::Nmi));
        for wrong in ["", "nmi,1=2", "mc,1", "mc,1=", "mc,x=1", "mc,:1=1", "mc 1=2"] {
            assert_eq!(Mishap::parse(wrong), None, "{wrong:?}");
        }
        assert_eq!(parse_writes(""), None);
    }
}
