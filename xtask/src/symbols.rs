//! The functions that addresses in a program belong to.

use std::collections::BTreeMap;
use std::fs;

use object::{Object, ObjectSymbol, SymbolKind};
use serde::Deserialize;

use crate::config::Setup;
use crate::events::Address;
use crate::system::System;

/// The functions of an ELF file, as far as it has symbols.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// Address, size and name of each, in order.
    functions: Vec<(u64, u64, String)>,
}

impl Symbols {
    /// Those of a file.
    pub fn of(file: &object::File<'_>) -> Self {
        let text = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text);
        let mut functions: Vec<_> = text
            .filter_map(|symbol| {
                let name = addr2line::demangle_auto(symbol.name().ok()?.into(), None);
                Some((symbol.address(), symbol.size(), name.into_owned()))
            })
            .collect();
        functions.sort();
        Self { functions }
    }

    /// The names of all of them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().map(|(_, _, name)| &**name)
    }

    /// The function that an address lies in, and how far from its start.
    pub fn at(&self, address: Address) -> Option<(&str, u64)> {
        let behind = self.functions.partition_point(|(start, ..)| *start <= address.0);
        let (start, size, name) = self.functions[..behind].last()?;
        let offset = address.0 - start;
        (offset < (*size).max(1)).then_some((name, offset))
    }
}

#[cfg(test)]
impl<const COUNT: usize> From<[(u64, u64, &str); COUNT]> for Symbols {
    /// Functions by address and size, in order.
    fn from(functions: [(u64, u64, &str); COUNT]) -> Self {
        let owned = |(start, size, name): (u64, u64, &str)| (start, size, name.to_owned());
        Self { functions: functions.into_iter().map(owned).collect() }
    }
}

/// The symbols of each VM's image. Images that cannot be read, or have none, are left out: it is the
/// hypervisor that judges them.
pub fn of_setup(setup: &Setup, system: &System) -> BTreeMap<String, Symbols> {
    #[derive(Deserialize)]
    struct Written {
        #[serde(default)]
        vm: Vec<Vm>,
    }
    #[derive(Deserialize)]
    struct Vm {
        name: String,
        image: String,
    }

    let Ok(Written { vm: vms }) = toml::from_str(&setup.config) else { return BTreeMap::new() };
    let symbols = vms.into_iter().filter_map(|vm| {
        let (_, source) = setup.images.iter().find(|(image, _)| *image == vm.image)?;
        let image = fs::read(system.image(source).ok()?).ok()?;
        let symbols = Symbols::of(&object::File::parse(&*image).ok()?);
        (!symbols.functions.is_empty()).then_some((vm.name, symbols))
    });
    symbols.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_within_a_function_or_not() {
        let symbols = Symbols::from([
            (0x1000, 0x20, "main"),
            (0x1040, 0, "label"),
            (u64::MAX - 3, 4, "last"),
        ]);
        assert_eq!(symbols.at(Address(0xfff)), None);
        assert_eq!(symbols.at(Address(0x1000)), Some(("main", 0)));
        assert_eq!(symbols.at(Address(0x101f)), Some(("main", 0x1f)));
        assert_eq!(symbols.at(Address(0x1020)), None);
        assert_eq!(symbols.at(Address(0x1040)), Some(("label", 0)));
        assert_eq!(symbols.at(Address(0x1041)), None);
        assert_eq!(symbols.at(Address(u64::MAX)), Some(("last", 3)));
    }
}
