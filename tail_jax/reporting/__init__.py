"""What a run leaves for people: files (`writers`), tables (`tables`) and pictures (`plots`)."""
