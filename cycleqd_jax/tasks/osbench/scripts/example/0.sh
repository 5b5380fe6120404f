cat > /usr/local/bin/calc << 'END'
#!/bin/bash
awk "BEGIN { printf \"%.10g\n\", $* }"
END
chmod +x /usr/local/bin/calc
